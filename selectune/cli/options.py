"""Options that several commands share, each with its sentence."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="The base model: a local folder, a hub id, or 'demo' (the MiniLM of a wheel)."),
]
DeltaPath = Annotated[
    str, typer.Option("--delta", "-d", help="The delta: a folder that train wrote, or a .safetensors file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout and nothing else there.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Folder of task/split.jsonl(.gz), as glue/rte/train.jsonl. Default: SELECTUNE_DATA, then the hub.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a hub model.", show_default=False),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Load weights as float32, bfloat16, float16 or float64. Default: as they are stored.",
        show_default=False,
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that a model brings. Read it first."),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="A Python file with methods (RECIPES) or tasks (TASKS); repeatable."),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        help="Tokens of an example. Default: the delta's or the task's.",
        show_default=False,
    ),
]
