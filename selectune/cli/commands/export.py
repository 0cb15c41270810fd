"""`selectune export` and `selectune delta import`: out to other people's tools, and in from them."""

from __future__ import annotations

from typing import Annotated

import typer

from selectune import plugins
from selectune.cli.options import DeltaPath, Dtype, Json, Model, OfTask, Plugins, Revision, Trust, option
from selectune.cli.output import result, working

EXAMPLES = (
    "Examples:\n\nselectune export merged --model demo --delta runs/rte --out merged/rte\n\n"
    "selectune export vllm --model smollm --delta runs/gsm8k --out patches/gsm8k --served-dtype float32"
)
IMPORT_EXAMPLES = "Example:  selectune delta import peft ./adapter --model ./base --out runs/imported"


def export(
    kind: Annotated[
        str,
        typer.Argument(
            help="merged: a plain model folder. peft: an adapter that stock peft loads. vllm: sparse weight patches. "
            "mergekit: a model folder with a recipe. safetensors-diff: pairs of places and values."
        ),
    ],
    model: Model,
    delta: DeltaPath,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write; it must be new or empty.")],
    served_dtype: Annotated[
        str | None,
        option("vllm: the dtype of the served weights. Default: the delta's own.", "--served-dtype"),
    ] = None,
    task: OfTask = None,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Write a delta in the form of another tool, all of it or nothing. The base is checked first."""
    from selectune.interop.bridges import export as write
    from selectune.models.restore import Source

    with working():
        plugins.add_files(plugin or ())
        source = Source(model, revision, dtype, trust_remote_code)
        value = write(kind, source, delta, out, None if task is None else plugins.task(task), served_dtype)
    result(as_json, value, f"{value['delta']} as {kind}: {out}, {value['bytes']:,} bytes")


def import_(
    kind: Annotated[
        str,
        typer.Argument(
            help="peft: a folder with SHiRA, Super-Tuning or trainable tokens. toolkit: a summary of the authors' "
            "toolkit. safetensors-diff: a file of pairs NAME.indices and NAME.values."
        ),
    ],
    file: Annotated[str, typer.Argument(help="The file or folder that the other tool wrote.")],
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder or .safetensors file for the delta.")],
    architecture: Annotated[
        str | None, option("Class of a model with a new head: BertForSequenceClassification.", "--architecture")
    ] = None,
    num_labels: Annotated[int | None, option("Outputs of that head.", "--num-labels")] = None,
    seed: Annotated[int, typer.Option(help="Seed of tensors that the base's checkpoint lacks (a head).")] = 6,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Make a delta from what another tool wrote: every scalar whose bits differ from the base's. No code in it runs."""
    from selectune.interop.bridges import import_delta
    from selectune.models.restore import Source
    from selectune.tasks import Head

    with working():
        head = None if architecture is None else Head(architecture, num_labels)
        delta = import_delta(kind, file, Source(model, revision, dtype, trust_remote_code), head, seed)
        path = delta.save(out)
    value = {"delta": str(path), "scalars": delta.selected, "tensors": len(delta.patches), "whole": len(delta.dense)}
    result(as_json, value, f"{delta.selected:,} scalars in {len(delta.patches)} tensors: {path}")
