"""The ground floor: how files are written and read, whatever is in them. Needs neither torch nor anything of a model.

durable.py   written whole or not at all, also after a crash; read once, into memory of our own
"""

from selectune.files.durable import MAX_FILE, read_owned, write_durably

__all__ = ["MAX_FILE", "read_owned", "write_durably"]
