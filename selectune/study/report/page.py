"""The report as one HTML page, which loads nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from selectune.errors import StudyError
from selectune.study.report.drawing import FORGETTING, Plot, forest, scatter, timelines
from selectune.study.report.heat import Spot
from selectune.study.report.numbers import brief, counted, interval, metric, percent, signed, size, spread
from selectune.study.report.shown import COSTS, Board, Result, Shown

HERE = Path(__file__).parent


def page(shown: Shown) -> str:
    """The page as text. Raises StudyError if jinja2 is not installed."""
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise StudyError("A report needs the package jinja2: pip install 'selectune[study]'.") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "metric": metric, "signed": signed, "spread": spread, "interval": interval, "counted": counted, "size": size,
        "brief": brief, "bin": bin_of, "spot": _in_words, "count": lambda value: f"{value:,.0f}",
    }  # fmt: skip
    script, style = ((HERE / name).read_text("utf-8") for name in ("script.js", "style.css"))
    return environment.get_template("page.html").render(
        shown=shown,
        style=Markup(style),
        script=Markup(script),
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        facts=_facts(shown),
        costs=COSTS,
        reference=next((line.label for board in shown.boards for line in board.lines if line.reference), ""),
        forests=[_some(forest(board, task) for task in board.tasks) for board in shown.boards],
        scatters=[{t: _some(scatter(board, t, cost) for cost in COSTS) for t in board.tasks} for board in shown.boards],
        **_lines(shown),
        **_lost(shown),
    )


def _some(plots: Any) -> list[Plot]:
    return [plot for plot in plots if plot is not None]


def _facts(shown: Shown) -> str:
    boards = shown.boards
    tasks = list(dict.fromkeys(task for board in boards for task in board.tasks))
    methods = {line.label for board in boards for line in board.lines}
    runs = sum(len(found.runs) for board in boards for task in board.tasks for _, found in board.of(task))
    models = ", ".join(board.model for board in boards)
    if shown.single:
        return f"{models} · {tasks[0]} · run {next(_runs(boards[0], tasks[0]))}"
    return f"{models} · {', '.join(tasks)} · {counted(len(methods), 'method')} · {counted(runs, 'run')}"


def _runs(board: Board, task: str) -> Any:
    return (run.run for _, found in board.of(task) for run in found.runs)


def _lines(shown: Shown) -> dict[str, Any]:
    lines = []
    for board in shown.boards:
        for task in board.tasks:
            each = [timelines(board, task, what) for what in ("metric", "loss", "selected")]
            title = task if len(shown.boards) == 1 else f"{task}, {board.model}"
            if any(each):
                lines.append((title, [found for found in each if found is not None]))
    lost = any(_forgotten(board, task) for board in shown.boards for task in board.tasks)
    sections = [
        ("answer", "Answer"), ("scores", "Result" if shown.single else "Leaderboard"), ("cost", "Cost"),
        ("retention", "Forgetting"), ("maps", "Where the budget went"), ("lines", "Timelines"), ("runs", "Runs"),
    ]  # fmt: skip
    there = {"retention": lost, "lines": bool(lines)}
    return {"lines": lines, "sections": [(id, name) for id, name in sections if there.get(id, True)]}


def _forgotten(board: Board, task: str) -> dict[str, Result]:
    return {line.label: found for line, found in board.of(task) if found.forgetting is not None}


def _lost(shown: Shown) -> dict[str, Any]:
    """The columns and rows of the table of forgetting, and its charts against the metric."""
    columns = [(board, task) for board in shown.boards for task in board.tasks if _forgotten(board, task)]
    labels = dict.fromkeys(label for board, task in columns for label in _forgotten(board, task))
    found = {(board.model, task): _forgotten(board, task) for board, task in columns}
    rows = [
        (label, [r.forgetting if (r := found[board.model, task].get(label)) else None for board, task in columns])
        for label in labels
    ]
    plots = [(board.metrics[task][0], scatter(board, task, FORGETTING)) for board, task in columns]
    return {
        "lost": columns,
        "lost_rows": rows,
        "lost_plots": [(name, plot) for name, plot in plots if plot is not None],
    }


def bin_of(count: int) -> int:
    """The shade of a count: 1 from 1 on, 2 from 10 on, and so on to 7; 0 for none.

    >>> [bin_of(count) for count in (0, 1, 9, 10, 999, 1000, 10**9)]
    [0, 1, 1, 2, 3, 4, 7]
    """
    return 0 if count < 1 else min(7, len(str(count)))


def _in_words(spot: Spot, total: int, ordered: bool) -> str:
    """A tensor in words: its name, how many scalars were selected, and when the first was."""
    if spot.whole:
        return f"{spot.name}: all {spot.numel:,} scalars, trained whole"
    text = (
        f"{spot.name}: {spot.count:,} of {spot.numel:,} scalars ({percent(spot.count / spot.numel)}), "
        f"{percent(spot.count / total)} of all that were selected; "
    )
    if not ordered or spot.first is None:
        return text + "when the first was chosen is not stored"
    at = f", at step {spot.step:,}" if spot.step is not None else ""
    return text + f"first chosen as number {spot.first + 1:,}{at}"
