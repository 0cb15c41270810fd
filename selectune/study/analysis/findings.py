"""Everything that can be said of one run or of several, as plain values; what cannot be said has its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from selectune.delta import Delta
from selectune.errors import ConfigError, StudyError
from selectune.models.restore import Source
from selectune.study.analysis.allocation import allocate, kinds_of, label_of, places_of
from selectune.study.analysis.magnitudes import against_full, by_group, moved
from selectune.study.analysis.sharing import overlaps
from selectune.study.analysis.spread import series, series_of, spread
from selectune.study.analysis.subjects import Subject, points_of
from selectune.study.analysis.supports import Support, support_of
from selectune.study.analysis.timing import by_tensor, histogram, update_counts

Found = dict[str, Any]


def analysed(
    subjects: Sequence[Subject], full: Subject | None = None, source: Source | None = None, seed: int = 0
) -> Found:
    """{"runs": {name: `findings`}} of several runs, and their "overlaps" if there are at least two.

    `full`: a run of full fine-tuning from the same base. `source`: the base of all runs; by default each delta's own
    record of it. `seed` draws the control sets. Raises ConfigError for a run without a support, ModelError for a base
    that cannot be found and BaseMismatchError for another base.
    """
    runs: Found = {}
    supports = []
    for subject in subjects:
        base = subject.base(source)
        support = support_of(subject.delta, base)
        supports.append(support)
        runs[subject.name] = findings(subject, support, base, None if full is None else full.delta, seed)
    more = {"overlaps": overlaps(supports, [s.name for s in subjects])} if len(subjects) > 1 else {}
    return {"runs": runs, **more}


def findings(subject: Subject, support: Support, base: nn.Module, full: Delta | None = None, seed: int = 0) -> Found:
    """What one run selected, when, and how far it moved. `left_out`: a sentence for each part that cannot be had."""
    delta, record = subject.delta, subject.record
    if full is not None and not any(part.kind == "parameter" for part in full.dense):
        raise ConfigError(f"{full.label} is no run of full fine-tuning: it trains no tensor whole.")
    left_out: dict[str, str] = {}

    def attempt(key: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except ConfigError as why:
            left_out[key] = str(why)
            return None

    steps = record.get("steps") or _steps(delta)
    rows = moved(delta, base)
    found: Found = {
        "path": str(subject.path),
        "method": delta.info["method"].get("name"),
        "task": delta.info["method"].get("task"),
        "seed": delta.info["method"].get("seed"),
        "selected": support.selected,
        "budget": delta.info["budget"],
        "scope": support.total,
        "tensors": len(support.sizes),
        "whole": sum(row["entries"] for row in rows if row["whole"]),
        "steps": steps,
        "run": record.get("run"),
        "spread": spread(support),
        "share": shares_of_kinds(support, base),
        "series": attempt("series", lambda: _series(subject, support, base, steps)),
        "allocation": attempt("allocation", lambda: _allocations(support, base)),
        "timing": attempt("timing", lambda: {"histogram": _columns(histogram(support)), "tensors": by_tensor(support)}),
        "updates": attempt("updates", lambda: _updates(support, steps)),
        "moved": {"groups": _groups(rows, base), "tensors": rows},
        "resolution": _resolution(rows),
        "full": None if full is None else attempt("full", lambda: _full(delta, full, base, support, seed)),
        "metric": {"name": record.get("metric"), "points": points_of(record)} if record else None,
    }
    return {**found, "left_out": left_out}


def shares_of_kinds(support: Support, model: nn.Module) -> dict[str, Any]:
    """How many of the selected entries lie in each kind of tensor: head, embeddings, and so on; matrices are `rest`."""
    kinds = kinds_of(model)
    counts: dict[str, int] = {}
    for name in support.sizes:
        flat = support.entries.get(name)
        counts[kinds[name]] = counts.get(kinds[name], 0) + (0 if flat is None else flat.numel())
    return {kind: {"selected": n, "share": n / support.selected} for kind, n in counts.items()}


def _steps(delta: Delta) -> int | None:
    told = delta.info["method"].get("schedule")
    steps = told.get("steps") if isinstance(told, Mapping) else None
    return steps if isinstance(steps, int) else None


def _series(subject: Subject, support: Support, base: nn.Module, steps: int | None) -> Found:
    if support.steps is not None and support.first_step != max(map(_last, support.steps.values())):
        return {**series(support, steps), "of": "each step"}
    if support.steps is not None or not subject.snapshots:
        if support.steps is None:
            support.until(0)  # says why not
        return {**series_of([(steps or 1, support)]), "of": "the one selection"}
    from selectune.delta import load

    taken = [(step, support_of(load(path), base)) for step, path in subject.snapshots]
    if steps is not None and steps not in dict(taken):
        taken.append((steps, support))
    return {**series_of(taken), "of": "the deltas on the way, cumulative"}


def _last(steps: Any) -> int:
    return int(steps.max())


def _allocations(support: Support, base: nn.Module) -> Found:
    start = None
    if support.steps is not None and support.first_step is not None:
        start = allocate(support.until(support.first_step), base).as_json()
    return {"start": start, "first_step": support.first_step, "end": allocate(support, base).as_json()}


def _columns(counts: Mapping[int, int]) -> Found:
    return {"steps": list(counts), "selected": list(counts.values())}


def _updates(support: Support, steps: int | None) -> Found:
    counts = histogram(support)
    if not isinstance(steps, int):
        raise ConfigError("The number of steps is not recorded: a static mask's delta needs the run's folder for it.")
    quotas = [counts.get(step, 0) for step in range(max(steps, max(counts) + 1))]
    found = update_counts(quotas)
    return {"given": found.given, "static": found.static, "uniform": found.uniform, "ratio": found.ratio}


def _groups(rows: Sequence[Mapping[str, Any]], base: nn.Module) -> Found:
    """The means of `moved` by role if the architecture has a role map, else by kind of tensor."""
    try:
        groups = {name: label_of(place) for name, place in places_of(base).items()}
    except ConfigError:
        groups = kinds_of(base)
    return by_group(rows, groups)


def _resolution(rows: Sequence[Mapping[str, Any]]) -> Found:
    mine = [row for row in rows if not row["whole"]]
    total = {key: sum(row[key] for row in mine) for key in ("written", "unchanged", "below_epsilon")}
    narrow = {name for row in mine for name in row["lost_in"]}
    return {**total, "lost_in": {name: sum(row["lost_in"][name] for row in mine) for name in sorted(narrow)}}


def _full(delta: Delta, full: Delta, base: nn.Module, support: Support, seed: int) -> Found:
    rows = moved(full, base)
    return {
        **against_full(delta, full, base, support, seed),
        "groups": _groups(rows, base),
        "tensors": [{key: row[key] for key in ("name", "mean_all", "mean_written")} for row in rows],
    }


def finite(value: Any) -> Any:
    """The value as JSON takes it: NaN becomes None.

    >>> finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def told(name: str, found: Mapping[str, Any]) -> list[str]:
    """The findings of one run as lines of text."""
    spread, touched = found["spread"], found["tensors"] - found["spread"]["untouched"]
    method = f"{found['method']}" + (f" on {found['task']}" if found["task"] else "")
    lines = [
        f"{name}: {method}, {found['selected']:,} of {found['scope']:,} scalars, in {touched:,} of "
        f"{found['tensors']:,} tensors (tensor sparsity {spread['tensor_sparsity']:.3f})"
        + (f"; {found['whole']:,} more in whole tensors" if found["whole"] else ""),
        f"  entropy     {spread['normalised']:.4f} nats, {spread['relative']:.3f} of ln {found['tensors']:,}; raw "
        f"{spread['raw']:.5f}, Bernoulli {spread['bernoulli']:.5f}",
        "  lie in      " + ", ".join(f"{kind} {row['share']:.1%}" for kind, row in found["share"].items()),
    ]
    if found["allocation"] is not None:
        lines.append("  densest     " + ", ".join(_densest(found["allocation"]["end"])))
    if found["timing"] is not None:
        steps, counts = found["timing"]["histogram"]["steps"], found["timing"]["histogram"]["selected"]
        half = next(s for at, s in enumerate(steps) if 2 * sum(counts[: at + 1]) >= sum(counts))
        lines.append(f"  selected    at steps {steps[0]:,} to {steps[-1]:,}, half of them by step {half:,}")
    if found["updates"] is not None:
        now = found["updates"]
        lines.append(
            f"  gradients   {now['given']:,}, {now['ratio']:.4f} of the {now['static']:,} that a static mask gives; "
            f"(T + 1) B / 2 is {now['uniform']:,.1f}"
        )
    lines.append(_moves(found["resolution"]))
    if found["full"] is not None:
        now = found["full"]
        lines.append(
            f"  against full fine-tuning: rho {now['rho']:.3f} over {now['entries']:,} entries; control "
            f"{now['control']:.3f} over {now['control_entries']:,} drawn at random"
        )
    if found["metric"] is not None and len(found["metric"]["points"]) > 1:
        points = found["metric"]["points"]
        lines.append(
            f"  {found['metric']['name']}: " + ", ".join(f"{p['value']:.4f} at {p['selected']:,}" for p in _few(points))
        )
    return lines + [f"  left out    {key}: {why}" for key, why in found["left_out"].items()]


def told_overlaps(found: Mapping[str, Any]) -> list[str]:
    """The overlaps as lines of text."""
    return [
        f"{pair['names'][0]} and {pair['names'][1]}: {pair['shared']:,} shared, Jaccard {pair['jaccard']:.4f}, overlap "
        f"{pair['overlap']:.4f}; by chance {pair['chance']['overlap']:.4f}, and {pair['chance_within']['overlap']:.4f} "
        "with the same number in each tensor"
        for pair in found["pairs"]
    ]


def _densest(end: Mapping[str, Any]) -> list[str]:
    cells = [
        (share, row, column)
        for row, shares in zip(end["rows"], end["shares"], strict=True)
        for column, share in zip(end["columns"], shares, strict=True)
        if share is not None
    ]
    return [f"{row} of layer {column} ({share:.3%})" for share, row, column in sorted(cells, reverse=True)[:3]]


def _moves(now: Mapping[str, Any]) -> str:
    lost = ", ".join(f"{count:,} in {name}" for name, count in now["lost_in"].items())
    return (
        f"  moved       {now['written'] - now['unchanged']:,} of {now['written']:,}; {now['below_epsilon']:,} by less "
        f"than their dtype's epsilon; changes that rounding would lose: {lost}"
    )


def _few(points: Sequence[Any]) -> list[Any]:
    """At most 5 of them, the first and the last included."""
    last = len(points) - 1
    return [points[at] for at in sorted({round(last * k / 4) for k in range(5)})]


def check_names(found: Mapping[str, Any]) -> None:
    """Raises StudyError if a run's name cannot be a folder's."""
    bad = [name for name in found["runs"] if not name or name in (".", "..") or "/" in name]
    if bad:
        raise StudyError(f"The run {bad[0]!r} has no name that a folder of figures could have.")
