"""Where the marks of a chart are: plain numbers, which the template writes as SVG."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from selectune.study.report.numbers import brief, interval, metric, signed, size, spread, unit_of
from selectune.study.report.shown import COSTS, Board, Points, Result

FORGETTING = "forgetting"
TITLES = {**COSTS, FORGETTING: "Forgetting"}
LETTER = 6.8
"""Width of a letter in a label of 12 pixels, on average."""


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high`, over pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, here = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (here - low) / (high - low) * (self.end - self.start), 1)


@dataclass(frozen=True)
class Tick:
    """A line of an axis, and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A point with whiskers from `low` to `high` and its label, if there is room. `say`: it in words."""

    x: float
    y: float
    low: float | None
    high: float | None
    label: str
    say: str
    href: str
    reference: bool
    text_x: float | None = None
    text_y: float = 0
    end: bool = False  # the label ends at text_x

    @property
    def led(self) -> bool:
        """Whether a thin line leads from the point to its label."""
        return self.text_x is not None and abs(self.text_y - self.y) > 8


@dataclass(frozen=True)
class Plot:
    """A chart of points."""

    title: str
    width: int
    height: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    zero: float | None = None  # where a difference is 0


@dataclass(frozen=True)
class Panel:
    """Lines of one method over steps. `mean`: the path of its mean; `runs`: those of its runs."""

    label: str
    say: str
    mean: str
    runs: tuple[str, ...]
    end: tuple[float, float] | None
    reference: bool


@dataclass(frozen=True)
class Timelines:
    """The panels of a task that share their axes. `table`: (label, mean value at each of `steps`)."""

    what: str
    title: str
    width: int
    height: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    panels: tuple[Panel, ...]
    steps: tuple[float, ...]
    table: tuple[tuple[str, tuple[float | None, ...]], ...]


def nice(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` round values that cover a range from within.

    >>> nice(0.0, 1.0), nice(3, 47, 4)
    ([0.0, 0.25, 0.5, 0.75, 1.0], [20.0, 40.0])
    """
    step = next(s for s in _steps(high - low) if (high - low) / s <= most - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _steps(width: float) -> Iterator[float]:
    power = 10.0 ** math.floor(math.log10(width) - 2)
    while True:
        yield from (power, 2 * power, 2.5 * power, 5 * power)
        power *= 10


def _padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * share or abs(high) * 0.05 or 1.0
    return low - pad, high + pad


def _ticks(scale: Scale, write: Callable[[float], str], most: int = 5) -> tuple[Tick, ...]:
    if not scale.log:
        return tuple(Tick(scale.at(value), write(value)) for value in nice(scale.low, scale.high, most))
    powers = range(math.ceil(math.log10(scale.low)), math.floor(math.log10(scale.high)) + 1)
    every = max(1, math.ceil(len(powers) / most))
    found = [10.0**p for p in powers][::every]
    if len(found) < 2:
        found = [scale.low * (scale.high / scale.low) ** share for share in (0.08, 0.5, 0.92)]
    return tuple(Tick(scale.at(value), write(value)) for value in found)


def _round(value: float) -> str:
    """A tick's value: no more digits than it has.

    >>> _round(0.25), _round(0.30000000000000004), _round(1200.0)
    ('0.25', '0.3', '1,200')
    """
    return f"{value:,.6g}".replace("-", "\N{MINUS SIGN}")


def scatter(board: Board, task: str, cost: str) -> Plot | None:
    """The metric against a cost or FORGETTING, a point for each method; None where fewer than two have that."""
    known = [(line, r, _cost(r, cost)) for line, r in board.of(task)]
    found = [(line, r, value) for line, r, value in known if value is not None]
    if len(found) < 2:
        return None
    width, height = 300, 250
    costs = [each for *_, each in found]
    log = max(costs) > 20 * min(costs) > 0
    unit, one = unit_of(cost, max(costs)) if cost != FORGETTING and not log else ("", 1)
    wide = (min(costs) / 1.5, max(costs) * 1.5) if log else _padded([each / one for each in costs])
    x = Scale(*wide, 44, width - 12, log)
    ends = [e for _, r, _ in found for e in (r.score.mean - (r.score.sd or 0), r.score.mean + (r.score.sd or 0))]
    y = Scale(*_padded(ends), height - 30, 22)
    name = board.metrics[task][0]
    write = signed if cost == FORGETTING else functools.partial(size, cost)
    marks = [
        Mark(
            x.at(each / one),
            y.at(r.score.mean),
            None if r.score.sd is None else y.at(r.score.mean - r.score.sd),
            None if r.score.sd is None else y.at(r.score.mean + r.score.sd),
            line.label,
            f"{line.label}: {name} {metric(r.score.mean)}{spread(r.score)}, {TITLES[cost].lower()} {write(each)}",
            r.anchor,
            line.reference,
        )
        for line, r, each in found
    ]
    return Plot(
        f"{TITLES[cost]}, {unit}" if unit else TITLES[cost], width, height,
        _ticks(x, write if log else _round, 3 if log else 4), _ticks(y, _round),
        _labelled(marks, 44, width - 4, 16, height - 34),
    )  # fmt: skip


def _cost(result: Result, cost: str) -> float | None:
    if cost == FORGETTING:
        return None if result.forgetting is None else result.forgetting.mean
    return result.costs.get(cost)


def _labelled(marks: Sequence[Mark], left: float, right: float, top: float, bottom: float) -> tuple[Mark, ...]:
    """The marks with labels beside them that cover no other label or mark; one that finds no room has none."""
    taken = [(m.x - 5, m.y - 5, m.x + 5, m.y + 5) for m in marks]
    done = []
    for mark in sorted(marks, key=lambda m: m.y):
        long = len(mark.label) * LETTER
        for shift in (0, -13, 13, -26, 26, -39, 39):
            for side in (9, -9):
                x, y = mark.x + side, mark.y + shift
                a, b = (x, x + long) if side > 0 else (x - long, x)
                box = (a, y - 6, b, y + 6)
                if a < left or b > right or y - 6 < top or y + 6 > bottom or any(_meet(box, each) for each in taken):
                    continue
                taken.append(box)
                done.append(dataclasses.replace(mark, text_x=round(x, 1), text_y=round(y, 1), end=side < 0))
                break
            else:
                continue
            break
        else:
            done.append(mark)
    return tuple(done)


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def forest(board: Board, task: str) -> Plot | None:
    """Differences from the reference with their intervals, a row for each method; None where there are none."""
    found = [(line, r, r.apart) for line, r in board.of(task) if r.apart is not None]
    if not found:
        return None
    row, width = 22, 300
    left = min(130.0, 14 + max(len(line.label) for line, *_ in found) * LETTER)
    ends = [e for *_, gap in found for e in (gap.mean, gap.low, gap.high) if e is not None]
    x = Scale(*_padded([0.0, *ends], 0.05), left, width - 10)
    marks = tuple(
        Mark(
            x.at(gap.mean),
            row * i + 16,
            None if gap.low is None else x.at(gap.low),
            None if gap.high is None else x.at(gap.high),
            _cut(line.label, left),
            f"{line.label}: {signed(gap.mean)} {interval(gap, sign=True)} over {gap.runs} pairs of runs",
            r.anchor,
            False,
        )
        for i, (line, r, gap) in enumerate(found)
    )
    return Plot(task, width, row * len(found) + 32, _ticks(x, _signed_tick, 4), (), marks, x.at(0.0))


def _signed_tick(value: float) -> str:
    return f"+{_round(value)}" if value > 1e-12 else _round(value) if value < -1e-12 else "0"


def _cut(label: str, room: float) -> str:
    most = int((room - 10) / LETTER)
    return label if len(label) <= most else label[: most - 1] + "…"


NAMES = {"loss": "Training loss", "selected": "Selected scalars"}


def timelines(board: Board, task: str, what: str) -> Timelines | None:
    """The lines of "metric", "loss" or "selected" over steps; None where no run has two points."""
    found = [(line, [points for points in r.lines[what] if len(points) > 1]) for line, r in board.of(task)]
    found = [(line, each) for line, each in found if each]
    if not found:
        return None
    width, height = (190, 130) if len(found) > 1 else (300, 190)
    every = [point for _, each in found for points in each for point in points]
    x = Scale(0, max(step for step, _ in every) or 1, 38, width - 8)
    y = Scale(*_padded([value for _, value in every]), height - 22, 8)
    means = {line.label: _mean_line(each) for line, each in found}
    name = NAMES.get(what, board.metrics[task][0])
    write = brief if what == "selected" else _round
    panels = [
        Panel(
            line.label,
            f"{line.label}: {name} {_value(what, means[line.label][-1][1])} at step {means[line.label][-1][0]:,.0f}, "
            f"mean of {len(each)}",
            _path(means[line.label], x, y),
            tuple(_path(points, x, y) for points in each) if len(each) > 1 else (),
            (x.at(means[line.label][-1][0]), y.at(means[line.label][-1][1])),
            line.reference,
        )
        for line, each in found
    ]
    longest = max(means.values(), key=len)
    steps = tuple(dict.fromkeys(longest[round(i * (len(longest) - 1) / 5)][0] for i in range(6)))
    table = tuple((label, tuple(_near(points, step) for step in steps)) for label, points in means.items())
    ticks = (Tick(x.at(0), "0"), Tick(x.at(x.high), f"{x.high:,.0f}"))
    return Timelines(what, name, width, height, ticks, _ticks(y, write, 4), tuple(panels), steps, table)


def _value(what: str, value: float) -> str:
    return f"{value:,.0f}" if what == "selected" else metric(value)


def _mean_line(each: Sequence[Points]) -> Points:
    """The mean over runs at the steps that all of them have."""
    shared = set.intersection(*({step for step, _ in points} for points in each))
    values: Mapping[float, list[float]] = {step: [] for step in sorted(shared)}
    for points in each:
        for step, value in dict(points).items():
            if step in shared:
                values[step].append(value)
    return tuple((step, math.fsum(found) / len(found)) for step, found in values.items()) or each[0]


def _near(points: Points, step: float) -> float | None:
    return next((value for at, value in points if at == step), None)


def _path(points: Points, x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{x.at(step):g} {y.at(value):g}" for step, value in points)
