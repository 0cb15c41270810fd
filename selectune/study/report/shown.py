"""Everything that a report shows, as one plain value; `page` and `markup` give it a form."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from selectune.runs.folder import RUN_FILE
from selectune.study.comparing.counted import resolved
from selectune.study.records import Record, Setting, size_of
from selectune.study.report.estimates import Estimate, differences, estimate
from selectune.study.report.heat import HeatMap, heat_map
from selectune.study.report.material import Material, number
from selectune.study.report.sentences import answer_of, notes_of

POINTS = 40
"""Points of a line, at most."""
SPOTS = 6_000
"""Tensors in all heat maps together, at most."""
COSTS = {"seconds": "Time of a run", "peak_bytes": "Peak memory", "delta_bytes": "Size of the delta"}

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Seed:
    """One run: its place, its numbers, and the command that runs it again."""

    seed: int
    lr: float
    value: float
    run: str
    cell: str
    command: str


@dataclass(frozen=True)
class Result:
    """One method on one task. `score`: of its runs' last values; `apart`: paired difference from the reference.

    `costs`: {name of a cost: its mean}. `trained`: scalars, selected or in whole tensors. `forgetting`: nats per token
    on another text. `lines`: {what: one line a run}.
    """

    task: str
    score: Estimate
    apart: Estimate | None
    costs: Mapping[str, float]
    trained: float
    examples: int
    forgetting: Estimate | None
    lines: Mapping[str, tuple[Points, ...]]
    runs: tuple[Seed, ...]
    anchor: str


@dataclass(frozen=True)
class Line:
    """One method: a row of the leaderboard. `results`: by task; None where no run is finished."""

    label: str
    reference: bool
    results: Mapping[str, Result | None]


@dataclass(frozen=True)
class Board:
    """One model's leaderboard. `metrics`: {task: (name of the metric, whether a lower value is better)}."""

    model: str
    metrics: Mapping[str, tuple[str, bool]]
    lines: tuple[Line, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.metrics)

    def of(self, task: str) -> list[tuple[Line, Result]]:
        """The lines that have a result on a task."""
        return [(line, found) for line in self.lines if (found := line.results[task]) is not None]


@dataclass(frozen=True)
class Shown:
    """All of a report. `command`: what makes it again. `answer`: three sentences. `notes`: what to know beside them."""

    title: str
    question: str
    single: bool
    command: str
    boards: tuple[Board, ...]
    maps: tuple[HeatMap, ...]
    answer: tuple[str, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]


def content(material: Material, against: str | None = None) -> Shown:
    """What the report of a study or run shows. `against`: the method that others are compared with.

    If it is None: full fine-tuning, or the first method. Raises ConfigError for a reference that has no finished run.
    """
    labels = _labels(dict.fromkeys(record.setting for record in material.runs))
    reference = _reference(labels, against)
    apart, cautions = ({}, ()) if material.single else differences((*material.records, *material.search), reference)
    by_model: dict[str, list[Record]] = defaultdict(list)
    for record in material.records:
        by_model[record.setting.model].append(record)
    boards = tuple(_board(material, model, rows, labels, reference, apart) for model, rows in by_model.items())
    boards = tuple(board for board in boards if board.lines)
    more = f" --against {shlex.quote(against)}" if against else ""
    versions = next((told for r in material.runs if isinstance(told := r.more.get("versions"), Mapping)), {})
    shown = Shown(
        material.title, material.question, material.single,
        f"selectune report {shlex.quote(str(material.folder))}{more}", boards, _maps(material, labels), (), (),
        {str(name): str(version) for name, version in versions.items()},
    )  # fmt: skip
    return dataclasses.replace(
        shown, answer=answer_of(shown), notes=(*material.notes, *notes_of(shown, material), *cautions)
    )


def _labels(settings: Iterable[Setting]) -> dict[Setting, str]:
    """A name of each setting's method, with what tells it from others of this name."""
    budgets: dict[tuple[str, str | None], set[object]] = defaultdict(set)
    for s in settings:
        budgets[s.method, s.on].add(s.budget)
    labels = {}
    for s in settings:
        size = f" at {size_of(s.budget)}" if len(budgets[s.method, s.on]) > 1 else ""
        labels[s] = f"{s.label}{size}"
    return labels


def _reference(settings: Iterable[Setting], against: str | None) -> str:
    names = sorted({setting.label for setting in settings})
    if against is None:
        return "full" if "full" in names else names[0]
    return resolved(against, settings)


def _board(
    material: Material,
    model: str,
    records: Sequence[Record],
    labels: Mapping[Setting, str],
    reference: str,
    apart: Mapping[Setting, Estimate],
) -> Board:
    ended = [record for record in records if record.last]
    metrics = {r.setting.task: (r.metric, r.lowest) for r in ended}
    runs: dict[tuple[str, str], dict[int, Record]] = defaultdict(dict)
    way: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        way[record.cell, record.setting.task].append(record)
        if record.last:
            runs[labels[record.setting], record.setting.task][record.seed] = record
    names = list(dict.fromkeys(label for label, _ in runs))

    def result(label: str, task: str) -> Result | None:
        mine = runs.get((label, task))
        if mine is None:
            return None
        return _result(material, task, mine, apart, way, f"{model} {task} {label}")

    compared = {labels[setting] for setting in labels if setting.label == reference}
    lines = [Line(label, label in compared, {task: result(label, task) for task in metrics}) for label in names]
    return Board(model, metrics, tuple(sorted(lines, key=lambda line: _rank(line, lines, metrics))))


def _rank(line: Line, lines: Sequence[Line], metrics: Mapping[str, tuple[str, bool]]) -> float:
    """The mean rank of a method over the tasks; where it has no result, it is last."""
    ranks = []
    for task, (_, lowest) in metrics.items():
        means = [other.score.mean for each in lines if (other := each.results[task]) is not None]
        mine = line.results[task]
        better = (
            len(lines)
            if mine is None
            else sum((m < mine.score.mean) if lowest else (m > mine.score.mean) for m in means)
        )
        ranks.append(better)
    return statistics.fmean(ranks)


def _result(
    material: Material,
    task: str,
    runs: Mapping[int, Record],
    apart: Mapping[Setting, Estimate],
    way: Mapping[tuple[str, str], Sequence[Record]],
    about: str,
) -> Result:
    ended = [runs[seed] for seed in sorted(runs)]
    # a time of 0 stands in older results of another task that a run was measured on
    costs = {name: _mean(number(r.more, name) or None for r in ended if r.steps) for name in COSTS}
    lost = [value for r in ended if (value := number(r.more, "forgetting")) is not None]
    logs = [material.logs.get(r.cell, ()) for r in ended]
    lines = {
        "metric": [
            [(r.step, r.value) for r in sorted(way[e.cell, task], key=lambda r: (r.step, r.last))] for e in ended
        ],
        "loss": [[(e["step"], e["loss"]) for e in log if "loss" in e] for log in logs],
        "selected": [
            [(e["step"], e["selected"]) for e in log if "selected" in e and "loss" in e]
            or [(r.step, r.selected) for r in way[end.cell, task]]
            for log, end in zip(logs, ended, strict=True)
        ],
    }
    return Result(
        task,
        estimate([record.value for record in ended]),
        apart.get(ended[0].setting),
        {name: cost for name, cost in costs.items() if cost is not None},
        statistics.fmean(number(r.more, "trained") or r.selected for r in ended),
        ended[0].examples,
        estimate(lost) if lost else None,
        {what: tuple(thin(line, mean=what == "loss") for line in each) for what, each in lines.items()},
        tuple(_seed(material, record) for record in ended),
        anchor(about),
    )


def _seed(material: Material, record: Record) -> Seed:
    folder = material.place(record.cell)
    told = shlex.quote(str(folder / RUN_FILE))
    again = f"selectune train --config {told} --out {shlex.quote(f'again/{record.cell}')}"
    if not record.steps:  # the base
        return Seed(
            record.seed, record.lr, record.value, "none", record.cell, str(record.more.get("command") or "none")
        )
    run = str(record.more.get("run") or "unknown")
    return Seed(record.seed, record.lr, record.value, run, record.cell, again)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def thin(line: Sequence[tuple[float, float]], most: int = POINTS, mean: bool = False) -> Points:
    """At most `most` points of a line: evenly spaced, the ends among them, or the means of even pieces.

    >>> thin([(i, i) for i in range(9)], 3), thin([(1, 2), (2, 4), (3, 6), (4, 8)], 2, mean=True)
    (((0, 0), (4, 4), (8, 8)), ((1.5, 3.0), (3.5, 7.0)))
    """
    if len(line) <= most:
        return tuple(line)
    if not mean:
        return tuple(line[round(i * (len(line) - 1) / (most - 1))] for i in range(most))
    cuts = [round(i * len(line) / most) for i in range(most + 1)]
    pieces = [line[a:b] for a, b in itertools.pairwise(cuts)]
    return tuple((statistics.fmean(x for x, _ in piece), statistics.fmean(y for _, y in piece)) for piece in pieces)


def anchor(text: str) -> str:
    """An id from a text; equal ids come from equal texts only.

    >>> anchor("demo glue/rte id3:exp=1")
    'runs-demo-glue_2f_rte-id3_3a_exp_3d_1'
    """
    return "runs-" + re.sub(r"[^A-Za-z0-9-]", lambda hit: f"_{ord(hit[0]):x}_", text.replace(" ", "-"))


def _maps(material: Material, labels: Mapping[Setting, str]) -> tuple[HeatMap, ...]:
    """A map for each model and method, of its first task and seed; those without one come last."""
    first: dict[tuple[str, str], Record] = {}
    for record in material.runs:
        if record.steps:  # the base has none
            first.setdefault((record.setting.model, labels[record.setting]), record)
    models = {model for model, _ in first}
    maps, left = [], SPOTS
    for (model, label), record in first.items():
        name = label if len(models) == 1 else f"{label}, {model}"
        about = f"{record.setting.task}, seed {record.seed}, run {record.more.get('run') or record.cell}"
        found = heat_map(material.place(record.cell), name, about, material.logs.get(record.cell, ()))
        left -= sum(len(row) for row in (found.rows or {}).values()) + len(found.outside)
        if left < 0:
            found = HeatMap(name, about, why=f"It is left out: a page shows {SPOTS:,} tensors in all its maps.")
        maps.append(found)
    return tuple(sorted(maps, key=lambda found: bool(found.why)))
