"""The sentences of a report: its answer, and what a reader must know beside it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from selectune.files.reading import some
from selectune.study.report.estimates import LEVEL, of_rows
from selectune.study.report.numbers import counted, interval, metric, signed, size, span, spread

if TYPE_CHECKING:
    from selectune.study.report.material import Material
    from selectune.study.report.shown import Board, Line, Result, Shown

SHARES = ("accuracy",)
"""Metrics that are a share of rows."""
TASKS = 3
"""Tasks that the answer names one by one."""


def answer_of(shown: Shown) -> tuple[str, ...]:
    """Three sentences at most: where the reference is, where the best other method is, and what can be told apart."""
    if shown.single:
        return _of_a_run(shown)
    parts = [(board, task) for board in shown.boards for task in board.tasks]
    said = [_reference(board, task) for board, task in parts[:TASKS]]
    more = f"; {counted(len(parts) - TASKS, 'more column')} in the table" if len(parts) > TASKS else ""
    best = [text for board, task in parts[:TASKS] if (text := _best(board, task))]
    name = next((line.label for board in shown.boards for line in board.lines if line.reference), None)
    first = f"The reference, {name}, reaches " if name else "The first methods reach "
    sentences = [f"{first}{', '.join(filter(None, said))}{more}."]
    if best:
        sentences.append(f"The best other method differs from it by {', '.join(best)}.")
    sentences.append(_verdict(shown))
    return tuple(sentences)


def _reference(board: Board, task: str) -> str:
    found = next((result for line, result in board.of(task) if line.reference), None)
    if found is None:
        return ""
    ends = f" {interval(found.score)}" if found.score.low is not None else ""
    return f"{board.metrics[task][0]} {metric(found.score.mean)}{ends} on {task}"


def _best(board: Board, task: str) -> str:
    lowest = board.metrics[task][1]
    others = [(line, result) for line, result in board.of(task) if not line.reference]
    if not others:
        return ""
    line, found = sorted(others, key=lambda pair: pair[1].score.mean * (1 if lowest else -1))[0]
    apart = found.apart
    if apart is None:
        return ""
    ends = f" {interval(apart, sign=True)}" if apart.low is not None else " (no interval: one pair of runs)"
    return f"{signed(apart.mean)}{ends} on {task} ({line.label})"


def _verdict(shown: Shown) -> str:
    better = worse = unclear = proved = 0
    for board in shown.boards:
        for task, (_, lowest) in board.metrics.items():
            for _, result in board.of(task):
                apart = result.apart
                if apart is None or apart.low is None or apart.high is None:
                    continue
                above, below = apart.low > 0, apart.high < 0
                better += below if lowest else above
                worse += above if lowest else below
                unclear += not above and not below
                proved += apart.holm is not None and apart.holm <= 1 - LEVEL
    total = better + worse + unclear
    if not total:
        return "No difference has an interval: that needs two seeds that a method and the reference share."
    return (
        f"Of {counted(total, 'difference')} from the reference, {better} {'is' if better == 1 else 'are'} better and "
        f"{worse} worse by the whole 95 % interval, and {unclear} cannot be told from 0; by Wilcoxon's test with "
        f"Holm's correction, {proved or 'none'} can."
    )


def _of_a_run(shown: Shown) -> tuple[str, ...]:
    board = shown.boards[0]
    (line, result) = board.of(board.tasks[0])[0]
    name, _ = board.metrics[result.task]
    examples = result.examples
    ends = ""
    if name in SHARES and examples:
        low, high = of_rows(result.score.mean, examples)
        ends = f", 95 % interval over rows {span(low, high)}"
    first = (
        f"{line.label} reaches {name} {metric(result.score.mean)} on {counted(examples, 'row')} of {result.task}{ends}."
    )
    sentences = [first, f"It trained {counted(round(result.trained), 'scalar')}{_took(result)}."]
    lost = result.forgetting
    if lost is not None:
        sentences.append(f"It lost {signed(lost.mean)} nats per token on a text that it was not trained on.")
    else:
        sentences.append("One run has no spread: what another seed would give is not known.")
    return tuple(sentences)


def _took(result: Result) -> str:
    told = [size(name, result.costs[name]) for name in ("seconds", "delta_bytes") if name in result.costs]
    if len(told) == 2:
        return f", took {told[0]}, and its delta has {told[1]}"
    return ""


def notes_of(shown: Shown, material: Material) -> tuple[str, ...]:
    """What must be known to read the numbers: pairs, corrections, searched rates, what is missing."""
    if shown.single:
        return ()
    lines = [(board, line) for board in shown.boards for line in board.lines]
    notes = []
    missing = [
        f"{line.label} on {task}" for _, line in lines for task, result in line.results.items() if result is None
    ]
    if missing:
        notes.append(f"No run is finished of {some(missing, ', ', 5)}.")
    notes.append(
        "± is the standard deviation over seeds. Brackets hold 95 % intervals of means by Student's t; differences are "
        "paired by seed. Intervals are not corrected for the number of comparisons, and cover no other tasks or models."
    )
    count = Counter(record.setting for record in material.search if record.last)
    if count:
        least, most = min(count.values()), max(count.values())
        runs = f"{most:,}" if least == most else f"from {least:,} to {most:,}"
        methods = len({(setting.label, setting.budget) for setting in count})
        notes.append(
            f"Learning rates were searched with {runs} trial runs for each of {methods} methods on each task, on other "
            "rows than those that are measured here; trial runs are in none of the numbers."
        )
    return tuple(notes)


def describe(line: Line, result: Result) -> str:
    """A method's score in words, for a screen reader."""
    return f"{line.label}: {metric(result.score.mean)}{spread(result.score)}, {counted(result.score.runs, 'run')}"
