"""`selectune verify` and `selectune delta show|diff|apply`."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectune import plugins
from selectune.cli.exits import FAILED, WRONG
from selectune.cli.options import DeltaPath, Dtype, Json, Model, OfTask, Plugins, Revision, Trust
from selectune.cli.output import fail, result, working
from selectune.errors import ConfigError, DeltaError, HubError, IntegrityError, ModelError, TaskError

if TYPE_CHECKING:
    from selectune.delta import Delta

VERIFY_EXAMPLES = (
    "Example:  selectune verify --model demo --delta runs/rte\n\n"
    "Exit codes: 0 verified, 1 wrong base, damaged file or more scalars than the budget, 2 the check was impossible"
)
app = typer.Typer(
    help="Show deltas, make one from two models, combine several, merge one into a model.", no_args_is_help=True
)


def verify(
    model: Model,
    delta: DeltaPath,
    task: OfTask = None,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Prove that a model is a delta's base and that the delta keeps its budget: apply it, compare bits, revert."""
    from selectune.delta.hub import is_repo
    from selectune.models.restore import Source, verify_delta

    try:
        with working():
            if not Path(delta).exists() and not is_repo(delta):
                raise ConfigError(f"There is no delta at {delta}: no such file or folder.")
            plugins.add_files(plugin or ())
            source = Source(model, revision, dtype, trust_remote_code)
            report = verify_delta(source, delta, None if task is None else plugins.task(task))
    except (HubError, ModelError, TaskError) as error:
        fail(error, WRONG, as_json)
        raise typer.Exit(WRONG) from None
    except (DeltaError, IntegrityError) as error:
        fail(error, FAILED, as_json=False)
        if as_json:
            result(True, {"ok": False, "problem": str(error)}, "")
        raise typer.Exit(FAILED) from None
    budget = "" if report.budget is None else f" of a budget of {report.budget:,}"
    dense = f", {report.dense:,} in whole tensors" if report.dense else ""
    text = (
        f"ok: the base is right, {report.changed:,} scalars differ{budget}{dense}, the revert left no trace"
        if report.ok
        else f"not ok: {report.problem}"
    )
    result(as_json, {"ok": report.ok, **asdict(report), "within_budget": report.within_budget}, text)
    if not report.ok:
        raise typer.Exit(FAILED)


@app.command(epilog="Example:  selectune delta show runs/rte --json")
def show(
    path: Annotated[str, typer.Argument(help="A folder that holds delta.safetensors, or a .safetensors file.")],
    as_json: Json = False,
) -> None:
    """Show what a delta holds: its method, budget and base, and the tensors it changes. No model is needed."""
    from selectune.delta import load

    delta = load(path)
    value = _described(delta)
    result(as_json, value, _shown(value))


def _described(delta: Delta) -> dict[str, Any]:
    from selectune.bits import dtype_name

    patches = [
        {"name": p.name, "shape": list(p.shape), "dtype": dtype_name(p.dtype), "count": p.indices.numel()}
        | ({"zeroed": True} if p.zeroed else {})
        for p in delta.patches
    ]
    dense = [{"name": d.name, "kind": d.kind, "shape": list(d.tensor.shape)} for d in delta.dense]
    return {
        **delta.info,
        "bytes": delta.nbytes,
        "digest": delta.digest,
        "reversible": delta.reversible,
        "patches": patches,
        "dense": dense,
    }


def _shown(value: dict[str, Any]) -> str:
    from selectune.adapters import Spec

    base, method = value["base"], value["method"]
    scalars = sum(patch["count"] for patch in value["patches"])
    adapter = value.get("module")
    sizes = {entry["name"]: math.prod(entry["shape"]) for entry in value["dense"]}
    lines = [
        f"method    {method.get('name', '?')}" + (f" on {method['task']}" if "task" in method else ""),
        *([f"adapter   {Spec(adapter['kind'], adapter['options'])}, seed {adapter['seed']}"] if adapter else []),
        f"selected  {scalars:,}" + ("" if value["budget"] is None else f" of {value['budget']:,}"),
        *([f"whole     {sum(sizes.values()):,} scalars in {len(sizes)} tensors"] if sizes else []),
        f"base      {base['id'] or 'unknown'}"
        + (f" at {base['revision']}" if base["revision"] else "")
        + (f", seed {base['seed']}" if base["seed"] is not None else ""),
        f"file      {value['bytes']:,} bytes, digest {value['digest']}"
        + (", carries the base's values" if value["reversible"] else ""),
    ]
    top = sorted(value["patches"], key=lambda patch: -patch["count"])[:10]
    lines += [f"  {patch['count']:>12,}  {patch['name']}" for patch in top]
    if len(value["patches"]) > len(top):
        lines.append(f"  {'':>12}  and {len(value['patches']) - len(top)} more tensors")
    lines += [f"  {size:>12,}  {name} (whole)" for name, size in list(sizes.items())[:10]]
    if len(sizes) > 10:
        lines.append(f"  {'':>12}  and {len(sizes) - 10} more whole tensors")
    return "\n".join(lines)


@app.command(epilog="Example:  selectune delta diff --base ./base --tuned ./tuned --out runs/difference")
def diff(
    base: Annotated[str, typer.Option("--base", help="The model that the delta starts from.")],
    tuned: Annotated[str, typer.Option("--tuned", help="The model that base + delta gives, of the same shape.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder or .safetensors file for the delta.")],
    seed: Annotated[int, typer.Option(help="Seed of tensors that the base's checkpoint lacks (a head).")] = 6,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Make a delta from two models of one shape: all scalars whose bits differ."""
    from selectune.models.restore import Source, diff_models

    with working():
        delta, path = diff_models(Source(base, revision, dtype, trust_remote_code), tuned, out, seed)
    value = {"delta": str(path), "scalars": delta.selected, "tensors": len(delta.patches), "bytes": delta.nbytes}
    result(as_json, value, f"{delta.selected:,} scalars in {len(delta.patches)} tensors differ: {path}")


@app.command(epilog="Example:  selectune delta apply --model demo --delta runs/rte --out merged/rte")
def apply(
    model: Model,
    delta: DeltaPath,
    out: Annotated[
        str, typer.Option("--out", "-o", help="Folder for the merged model and its tokenizer; new or empty.")
    ],
    task: OfTask = None,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Write base + delta as an ordinary model folder, which loads without selectune."""
    from selectune.models.restore import Source, merge_delta

    with working():
        plugins.add_files(plugin or ())
        source = Source(model, revision, dtype, trust_remote_code)
        value = merge_delta(source, delta, out, None if task is None else plugins.task(task))
    result(as_json, value, f"{value['model']} + {value['delta']}: {value['out']}")
