"""`selectune delta add|scale|ties|dare|overlap`: arithmetic on delta files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectune.cli.options import Dtype, Json, Revision, Trust
from selectune.cli.output import result, working
from selectune.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from selectune.delta import Delta
    from selectune.delta.combine import algebra
    from selectune.models.restore import Source

Paths = Annotated[
    list[str], typer.Argument(help="Deltas of one base: folders that hold delta.safetensors, or .safetensors files.")
]
Path = Annotated[str, typer.Argument(help="A folder that holds delta.safetensors, or a .safetensors file.")]
Out = Annotated[str, typer.Option("--out", "-o", help="Folder or .safetensors file for the result.")]
Base = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="The base model. Needed unless every delta carries the base's values (saved with old values).",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", "-w", help="A number for each delta: 1,0.5. Default: all 1.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Puts the commands into the `delta` group."""
    app.command("add", epilog="Example:  selectune delta add runs/rte runs/stsb --model demo --out runs/both")(add)
    app.command("scale", epilog="Example:  selectune delta scale runs/rte --by -1 --model demo --out runs/undo")(scale)
    app.command(
        "ties", epilog="Example:  selectune delta ties runs/rte runs/stsb --density 0.5 --model demo --out runs/ties"
    )(ties)
    app.command(
        "dare", epilog="Example:  selectune delta dare runs/rte runs/stsb --drop 0.9 --model demo --out runs/dare"
    )(dare)
    app.command("overlap", epilog="Example:  selectune delta overlap runs/rte runs/stsb --json")(overlap)


def add(
    deltas: Paths,
    out: Out,
    weights: Weights = None,
    model: Base = None,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Sum deltas: base + w1 d1 + w2 d2 + ...; where they do not overlap, that is applying one after another."""
    from selectune.delta.combine import algebra

    factors = _numbers(weights)
    source = _source(model, revision, dtype, trust_remote_code)
    _run(deltas, source, out, as_json, lambda found, base: algebra.add(found, weights=factors, base=base))


def scale(
    delta: Path,
    by: Annotated[float, typer.Option("--by", help="Factor: 0.5 halves the delta, -1 negates it.")],
    out: Out,
    model: Base = None,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Make a delta stronger or weaker: base + factor x difference, where the delta writes."""
    from selectune.delta.combine import algebra

    source = _source(model, revision, dtype, trust_remote_code)
    _run([delta], source, out, as_json, lambda found, base: algebra.scale(found[0], by, base=base))


def ties(
    deltas: Paths,
    density: Annotated[float, typer.Option("--density", help="Share of each delta's scalars that stays, in (0, 1].")],
    out: Out,
    weights: Weights = None,
    strength: Annotated[float, typer.Option("--scale", help="Factor on the merged difference.")] = 1.0,
    model: Base = None,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Merge by TIES: trim small differences, elect a sign for each scalar, average those that have it."""
    from selectune.delta.combine import algebra

    factors = _numbers(weights)
    source = _source(model, revision, dtype, trust_remote_code)
    _run(
        deltas, source, out, as_json,
        lambda found, base: algebra.ties(found, density=density, weights=factors, scale=strength, base=base),
    )  # fmt: skip


def dare(
    deltas: Paths,
    drop: Annotated[float, typer.Option("--drop", help="Probability that a difference is dropped, in [0, 1).")],
    out: Out,
    seed: Annotated[int, typer.Option("--seed", help="Decides what is dropped.")] = 0,
    weights: Weights = None,
    model: Base = None,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Merge by DARE: drop differences at random, grow the rest by 1 / (1 - drop), sum."""
    from selectune.delta.combine import algebra

    factors = _numbers(weights)
    source = _source(model, revision, dtype, trust_remote_code)
    _run(
        deltas, source, out, as_json,
        lambda found, base: algebra.dare(found, drop=drop, seed=seed, weights=factors, base=base),
    )  # fmt: skip


def overlap(
    first: Path,
    second: Path,
    as_json: Json = False,
) -> None:
    """Say how much of the first delta's support lies in the second's. Needs no model; bases may differ."""
    from selectune.delta import load
    from selectune.delta.combine import algebra

    found = algebra.overlap(load(first), load(second))
    value = {**_overlap(found), "tensors": {name: _overlap(row) for name, row in found.tensors.items()}}
    lines = [
        f"{found.shared:,} of {found.first:,} scalars ({found.ratio:.2%}) are among the {found.second:,} of the other; "
        f"Jaccard {found.jaccard:.4f}"
    ]
    rows = sorted(found.tensors.items(), key=lambda row: -row[1].shared)[:10]
    lines += [f"  {row.shared:>12,} of {row.first:>12,}  {name}" for name, row in rows if row.shared]
    result(as_json, value, "\n".join(lines))


def _run(
    paths: Sequence[str],
    source: Source | None,
    out: str,
    as_json: bool,
    merge: Callable[[list[Delta], nn.Module | None], Delta],
) -> None:
    from selectune.delta import load
    from selectune.delta.combine import algebra
    from selectune.models.restore import load_base

    with working():
        deltas = [load(path) for path in paths]
        base = None if source is None else load_base(source, deltas[0], None).model
        made = merge(deltas, base)
        report = algebra.conflicts(deltas, base=base)
        path = made.save(out)
    value = {
        "delta": str(path),
        "method": made.info["method"],
        "scalars": made.selected,
        "bytes": made.nbytes,
        "reversible": made.reversible,
        "conflicts": {**report.totals, "tensors": {name: row.totals for name, row in report.tensors.items()}},
    }
    lines = [f"{made.label}: {path}"]
    if len(deltas) > 1:
        lines.append(f"{report.shared:,} scalars are written by several deltas, {report.opposed:,} with opposed signs")
        rows = sorted(report.tensors.items(), key=lambda row: (-row[1].opposed, -row[1].shared))[:10]
        lines += [f"  {row.opposed:>12,} of {row.shared:>12,}  {name}" for name, row in rows]
    result(as_json, value, "\n".join(lines))


def _source(model: str | None, revision: str | None, dtype: str | None, trust: bool) -> Source | None:
    from selectune.models.restore import Source

    return None if model is None else Source(model, revision, dtype, trust)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {text}: numbers with commas between them are expected, as 1,0.5.") from None


def _overlap(found: algebra.Overlap) -> dict[str, Any]:
    return {
        "first": found.first,
        "second": found.second,
        "shared": found.shared,
        "ratio": found.ratio,
        "jaccard": found.jaccard,
    }
