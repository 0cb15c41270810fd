"""Tasks that are generated here, so that a demo needs neither data nor network."""
