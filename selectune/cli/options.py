"""The options that several commands share, and one way to write an option."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def option(text: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    """An option without a default: `text` says what happens if it is left out, so the help shows no default."""
    return typer.Option(*names, help=text, show_default=False, rich_help_panel=panel, **more)


Model = Annotated[str, typer.Option("--model", "-m", help="The base: a folder, a hub id, 'demo' or 'smollm'.")]
Retain = Annotated[
    str | None, option("Measure forgetting on this text too: wikitext2, or a file of UTF-8.", "--retain")
]
DeltaPath = Annotated[
    str, typer.Option("--delta", "-d", help="The delta: a folder that train wrote, or a .safetensors file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print only the result on stdout, as JSON.")]
Data = Annotated[
    str | None,
    option("Folder of task/split.jsonl(.gz), such as glue/rte. Default: SELECTUNE_DATA, then the hub.", "--data"),
]
Revision = Annotated[str | None, option("Branch, tag or commit of a hub model.", "--revision")]
Dtype = Annotated[
    str | None,
    option("Load weights as float32, bfloat16, float16 or float64. Default: the stored type.", "--dtype"),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python code of the model. Read it first.")]
Plugins = Annotated[list[str] | None, option("A Python file with methods or tasks; repeatable.", "--plugin")]
MaxLength = Annotated[
    int | None, option("Tokens of an example. Default: the delta's or the task's.", "--max-length", min=1)
]
OfTask = Annotated[str | None, option("Task of the head. Default: the delta's own.", "--task", "-t")]

ROWS = "Rows of your own"
Validation = Annotated[
    str | None, option("A file of rows to measure on, or a hub id; see --train.", "--validation", panel=ROWS)
]
Text = Annotated[
    list[str] | None, option("The column of the text; two with a comma: premise,hypothesis.", "--text", panel=ROWS)
]
Label = Annotated[str | None, option("The column of what is to be learned.", "--label", panel=ROWS)]
PATTERN = option(
    "A task of classes as a cloze, answered by a language model's own head: '{} It was [MASK].' for a masked one, "
    "'{} It was' for a causal one; {} is the text of the row, and \\n a new line.",
    "--pattern",
)
Pattern = Annotated[str | None, PATTERN]
Words = Annotated[
    list[str] | None,
    option("With --pattern: the word of each class, in the order of the labels, with commas: bad,good.", "--words"),
]
Shots = Annotated[
    int | None, option("With --pattern: so many training rows and their words stand before every row.", "--shots")
]
EvalSize = Annotated[
    int | None, option("Measure on at most so many rows, the same for every method and seed.", "--eval-size", min=1)
]
KindOption = Annotated[
    str | None,
    option(
        "classification, regression, multilabel, tagging, completion, completion-loss, seq2seq, choice or language. "
        "Default: what the labels look like.",
        "--kind",
        panel=ROWS,
    ),
]
