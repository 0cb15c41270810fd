"""`selectune delta add|scale|cut|ties|dare|overlap`: arithmetic on delta files."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from selectune.cli import values
from selectune.cli.options import Dtype, Json, Revision, Trust, option
from selectune.cli.output import result, working
from selectune.errors import ConfigError

if TYPE_CHECKING:
    from selectune.delta.combine import algebra

log = logging.getLogger("selectune")

Paths = Annotated[list[str], typer.Argument(help="Deltas of one base: folders of train, or .safetensors files.")]
Path = Annotated[str, typer.Argument(help="A folder that holds delta.safetensors, or a .safetensors file.")]
Out = Annotated[str, typer.Option("--out", "-o", help="Folder or .safetensors file for the result.")]
Base = Annotated[
    str | None,
    option("The base model. Needed unless every delta carries the base's values.", "--model", "-m"),
]
Weights = Annotated[str | None, option("A number for each delta: 1,0.5. Default: all 1.", "--weights", "-w")]


def register(app: typer.Typer) -> None:
    """Puts the commands into the `delta` group."""
    for command, example in (
        (add, "runs/rte runs/stsb --model demo --out runs/both"),
        (scale, "runs/rte --by -1 --model demo --out runs/undo"),
        (cut, "runs/rte --budget 10k --model demo --out runs/rte-10k"),
        (ties, "runs/rte runs/stsb --density 0.5 --model demo --out runs/ties"),
        (dare, "runs/rte runs/stsb --drop 0.9 --model demo --out runs/dare"),
        (overlap, "runs/rte runs/stsb --json"),
    ):
        app.command(epilog=f"Example:  selectune delta {command.__name__} {example}")(command)


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
    """Sum deltas: base + w1 d1 + w2 d2 + ... Without overlap this applies one delta after another."""
    base = _Base(model, revision, dtype, trust_remote_code)
    base.combine("add", deltas, out, as_json, weights=_numbers(weights))


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
    _Base(model, revision, dtype, trust_remote_code).combine("scale", [delta], out, as_json, factor=by)


def cut(
    delta: Path,
    budget: Annotated[str, typer.Option("--budget", "-b", help="Scalars to keep: 10k.")],
    out: Out,
    model: Base = None,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Keep the scalars that were selected first. Their values are those that were trained with the larger budget."""
    log.warning("The values of %s were trained with all of its scalars; a run with this budget gives others.", delta)
    _Base(model, revision, dtype, trust_remote_code).combine("cut", [delta], out, as_json, budget=values.budget(budget))


def ties(
    deltas: Paths,
    density: Annotated[float, typer.Option("--density", help="Share of each delta's scalars to keep, in (0, 1].")],
    out: Out,
    weights: Weights = None,
    strength: Annotated[float, typer.Option("--scale", help="Factor on the merged difference.")] = 1.0,
    model: Base = None,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Merge by TIES: trim small differences, elect a sign for each scalar, and average those that have it."""
    base = _Base(model, revision, dtype, trust_remote_code)
    base.combine("ties", deltas, out, as_json, density=density, weights=_numbers(weights), scale=strength)


def dare(
    deltas: Paths,
    drop: Annotated[float, typer.Option("--drop", help="Probability that a difference is dropped, in [0, 1).")],
    out: Out,
    seed: Annotated[int, typer.Option("--seed", help="Decides which differences are dropped.")] = 0,
    weights: Weights = None,
    model: Base = None,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Merge by DARE: drop differences at random, grow the rest by 1 / (1 - drop), and sum."""
    base = _Base(model, revision, dtype, trust_remote_code)
    base.combine("dare", deltas, out, as_json, drop=drop, seed=seed, weights=_numbers(weights))


def overlap(first: Path, second: Path, as_json: Json = False) -> None:
    """Print the share of the first delta's support that is in the second's. No model is needed; bases may differ."""
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


class _Base(NamedTuple):
    """The base of deltas that are combined, if it was named."""

    model: str | None
    revision: str | None
    dtype: str | None
    trust_remote_code: bool

    def combine(self, name: str, paths: list[str], out: str, as_json: bool, **options: Any) -> None:
        """Combines deltas by a function of `algebra`, saves the result, and prints it with the conflicts."""
        from selectune.delta import load
        from selectune.delta.combine import algebra
        from selectune.models.restore import Source, load_base

        with working():
            deltas = [load(path) for path in paths]
            source = None if self.model is None else Source(self.model, *self[1:])
            base = None if source is None else load_base(source, deltas[0], None).model
            made = getattr(algebra, name)(deltas[0] if name in ("scale", "cut") else deltas, base=base, **options)
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
            lines.append(
                f"{report.shared:,} scalars are written by several deltas, {report.opposed:,} with opposed signs"
            )
            rows = sorted(report.tensors.items(), key=lambda row: (-row[1].opposed, -row[1].shared))[:10]
            lines += [f"  {row.opposed:>12,} of {row.shared:>12,}  {name}" for name, row in rows]
        result(as_json, value, "\n".join(lines))


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {text}: numbers separated by commas are needed, such as 1,0.5.") from None


def _overlap(found: algebra.Overlap) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("first", "second", "shared", "ratio", "jaccard")}
