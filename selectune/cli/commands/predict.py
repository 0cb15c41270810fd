"""`selectune predict` and `selectune generate`: what a model answers to a file of rows."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from selectune.cli import signals
from selectune.cli.options import (
    Dtype,
    Json,
    KindOption,
    MaxLength,
    Model,
    OfTask,
    Plugins,
    Revision,
    Text,
    Trust,
    option,
)
from selectune.cli.output import ProgressBar, result, working

EXAMPLES = (
    "Examples:\n\nselectune predict --model demo --delta runs/my --input rows.jsonl --out answers.jsonl\n\n"
    "selectune predict --model ./merged --kind classification --text question --input rows.csv --out answers.jsonl"
)

GENERATE_EXAMPLES = (
    "Examples:\n\nselectune generate --model smollm --text question --input rows.jsonl --out answers.jsonl\n\n"
    "selectune generate --model smollm --delta runs/gsm8k --input rows.jsonl --out answers.jsonl --max-new-tokens 256"
)
Rows = Annotated[
    str,
    typer.Option("--input", "-i", help="A file of rows: .jsonl(.gz), .csv, .tsv, .parquet; no label is needed."),
]
Out = Annotated[str, typer.Option("--out", "-o", help="File for the rows with their predictions, as JSON lines.")]
Delta = Annotated[str | None, option("The delta to apply; it knows its task.", "--delta", "-d")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace --out and what is left of it.")]


def predict(
    model: Model,
    rows: Rows,
    out: Out,
    delta: Delta = None,
    task: OfTask = None,
    text: Text = None,
    kind: KindOption = None,
    max_length: MaxLength = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Predict the rows of a file, in their order. If it is stopped, the same command goes on from OUT.partial."""
    source = (model, revision, dtype, trust_remote_code)
    _predict(source, rows, out, delta, task, text, kind, max_length, overwrite, plugin, as_json, None)


def generate(
    model: Model,
    rows: Rows,
    out: Out,
    text: Text = None,
    delta: Delta = None,
    task: OfTask = None,
    kind: Annotated[str | None, option("completion (the default without a delta) or seq2seq.", "--kind")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that an answer may have.")] = 128,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search; 1 takes the likeliest token.")] = 1,
    max_length: MaxLength = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Write a text for each row of a file, in their order. If it is stopped, the same command goes on."""
    source = (model, revision, dtype, trust_remote_code)
    kind = "completion" if kind is None and task is None and delta is None else kind
    settings = {"max_new_tokens": max_new_tokens, "beams": beams}
    _predict(source, rows, out, delta, task, text, kind, max_length, overwrite, plugin, as_json, settings)


def _predict(
    source: tuple[str, str | None, str | None, bool],
    rows: str,
    out: str,
    delta: str | None,
    task: str | None,
    text: list[str] | None,
    kind: str | None,
    max_length: int | None,
    overwrite: bool,
    plugin: list[str] | None,
    as_json: bool,
    generation: dict[str, int] | None,
) -> None:
    from selectune import plugins
    from selectune.models.predictions import predict_rows
    from selectune.models.restore import Source
    from selectune.runs.config import patterns
    from selectune.runs.result import Update
    from selectune.runs.stop import Stop

    out, rows = os.path.expanduser(out), os.path.expanduser(rows)
    stop, bar = Stop(), ProgressBar()
    stop.where = "before the first batch, so nothing is lost"
    signals.heed(stop)

    def follow(done: int, batches: int) -> None:
        if done == 1:
            bar.start(f"predict {os.path.basename(rows)}", batches)
            stop.where = f"and {out}.partial has what was done: the same command goes on from there"
        bar.update(Update(done, batches, None, 0, 0, None))

    with working():
        plugins.add_files(plugin or ())
        try:
            found = predict_rows(
                Source(*source), delta, rows, out, patterns(text), task, kind, max_length, overwrite, generation, follow
            )
        finally:
            bar.stop()
    result(as_json, found, f"{found['rows']:,} rows of {rows}: {out}")
