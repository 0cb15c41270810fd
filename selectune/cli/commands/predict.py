"""`selectune predict`: a model's predictions for a file of rows."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from selectune.cli import signals
from selectune.cli.options import Dtype, Json, KindOption, MaxLength, Model, Plugins, Revision, Text, Trust, option
from selectune.cli.output import ProgressBar, result, working

EXAMPLES = (
    "Examples:\n\nselectune predict --model demo --delta runs/my --input rows.jsonl --out answers.jsonl\n\n"
    "selectune predict --model ./merged --kind classification --text question --input rows.csv --out answers.jsonl"
)


def predict(
    model: Model,
    rows: Annotated[
        str,
        typer.Option("--input", "-i", help="A file of rows: .jsonl(.gz), .csv, .tsv, .parquet; no label is needed."),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="File for the rows with their predictions, as JSON lines.")],
    delta: Annotated[str | None, option("The delta to apply; it knows its task.", "--delta", "-d")] = None,
    task: Annotated[str | None, option("Task of the head. Default: the delta's own.", "--task", "-t")] = None,
    text: Text = None,
    kind: KindOption = None,
    max_length: MaxLength = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out and what is left of it.")] = False,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Predict the rows of a file, in their order. If it is stopped, the same command goes on from OUT.partial."""
    from selectune import plugins
    from selectune.models.predictions import predict_rows
    from selectune.models.restore import Source
    from selectune.runs.config import patterns
    from selectune.runs.stop import Stop
    from selectune.runs.training import Update

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
        source = Source(model, revision, dtype, trust_remote_code)
        try:
            found = predict_rows(source, delta, rows, out, patterns(text), task, kind, max_length, overwrite, follow)
        finally:
            bar.stop()
    result(as_json, found, f"{found['rows']:,} rows of {rows}: {out}")
