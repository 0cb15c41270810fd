"""The GLUE tasks of the papers, with the papers' metrics and settings (arXiv 2408.14470, appendix)."""

from __future__ import annotations

from selectune.tasks.common import Hub

_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"


def on_hub(config: str) -> Hub:
    """A configuration of GLUE on the hub, at a fixed commit."""
    return Hub("nyu-mll/glue", config, _REVISION)
