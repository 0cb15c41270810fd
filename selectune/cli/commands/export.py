"""`selectune export`, `delta import` and `push`: out to other people's tools and to the hub, and in from tools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from selectune import plugins
from selectune.cli.options import DeltaPath, Dtype, Json, Model, OfTask, Plugins, Revision, Trust, option
from selectune.cli.output import result, working

if TYPE_CHECKING:
    from selectune.delta.hub import Upload

EXAMPLES = (
    "Examples:\n\nselectune export merged --model demo --delta runs/rte --out merged/rte\n\n"
    "selectune export vllm --model smollm --delta runs/gsm8k --out patches/gsm8k --served-dtype float32"
)
PUSH_EXAMPLES = (
    "Examples:\n\nselectune push runs/rte org/name\n\nselectune push runs/rte org/name --private --yes\n\n"
    "Any command takes it from there: --delta org/name, or org/name@REVISION"
)
IMPORT_EXAMPLES = "Example:  selectune delta import peft ./adapter --model ./base --out runs/imported"


def export(
    kind: Annotated[
        str,
        typer.Argument(
            help="merged: a plain model folder. dequantised: the same of a quantised base, rounded. peft: an adapter "
            "that stock peft loads. vllm: sparse weight patches. mergekit: a model folder with a recipe. "
            "safetensors-diff: pairs of places and values."
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


def push(
    delta: Annotated[str, typer.Argument(help="The delta: a folder that train wrote, or a .safetensors file.")],
    repo: Annotated[str, typer.Argument(help="The repository on the Hugging Face hub: org/name.")],
    yes: Annotated[bool, typer.Option("--yes", help="Upload it. Without it nothing is sent.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    branch: Annotated[str | None, option("The branch to write to. Default: main.", "--branch")] = None,
    message: Annotated[str | None, option("The commit's message. Default: the delta's label.", "--message")] = None,
    license: Annotated[str | None, option("Licence of the delta, as the hub has it: apache-2.0.", "--license")] = None,
    as_json: Json = False,
) -> None:
    """Show what would be uploaded to the hub: files, sizes and the model card. With --yes, upload it in one commit."""
    from selectune.delta import load
    from selectune.models.recorded import run_of

    with working():
        metrics, commands = run_of(delta)
        made = load(delta).push_to_hub(
            repo, private=private or None, revision=branch, message=message, license=license, metrics=metrics,
            commands=commands, dry_run=not yes,
        )  # fmt: skip
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in made.files.items()}
    result(as_json, {**vars(made), "files": files, "sent": yes}, _pushed(made))


def _pushed(made: Upload) -> str:
    where = f"{made.endpoint}/{made.repo}"
    lines = [f"  {size:>12,} bytes  {name}  sha256 {digest}" for name, (size, digest) in made.files.items()]
    if made.commit is not None:
        return "\n".join([f"{where} at commit {made.commit}", *lines])
    folder = [f"The file names the folder of its base on this machine: {made.path}"] if made.path else []
    kind = "private, if it is new" if made.private else "public, or as the organisation has it, if it is new"
    head = [f"Nothing was sent. With --yes, this goes to {where}, branch {made.revision} ({kind}):"]
    return "\n".join([*head, *lines, f"Commit message: {made.message}", *folder, "", made.card.rstrip()])
