"""The tables of a report for a text: Markdown, and LaTeX with booktabs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from selectune.study.report.numbers import MINUS, interval, metric, signed, size, spread
from selectune.study.report.shown import COSTS, Board, Shown

_TEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", MINUS: "$-$", "±": r"$\pm$", "·": r"$\cdot$", "…": r"\dots{}",
    "`": r"\textasciigrave{}", '"': r"\textquotedbl{}",
} | {letter: f"\\{letter}" for letter in "&%$#_{}"}  # fmt: skip


@dataclass(frozen=True)
class Tabulation:
    """A table as text: its caption, its head, its rows; the first column is of names."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def markdown(shown: Shown) -> str:
    """The answer, the notes, and the tables of a report as Markdown."""
    parts = [f"# {_md(shown.title)}", _md(shown.question), _md(" ".join(shown.answer))]
    parts += [_md_table(table) for table in tabulations(shown)]
    parts += ["\n".join(f"* {_md(note)}" for note in shown.notes)]
    parts += ["## Runs", "\n".join(_commands(shown)), f"Made by `{_code(shown.command)}`."]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(shown: Shown) -> str:
    """The tables of a report as LaTeX, for a text that loads booktabs. The commands are comments."""
    tables = [_tex_table(table) for table in tabulations(shown)]
    notes = [f"% {_line(note)}" for note in (*shown.answer, *shown.notes)]
    made = [f"% Made by {_line(shown.command)}"]
    return "\n".join([*made, *notes, "", "\n\n".join(tables)]) + "\n"


def tabulations(shown: Shown) -> list[Tabulation]:
    """The tables: scores for each model, differences from the reference, costs and forgetting for each task."""
    found = []
    for board in shown.boards:
        found.append(_scores(board))
        for task in board.tasks:
            found.append(_details(board, task))
    return found


def _scores(board: Board) -> Tabulation:
    def cell(line: int, task: str) -> str:
        result = board.lines[line].results[task]
        return "" if result is None else f"{metric(result.score.mean)}{spread(result.score)} ({result.score.runs})"

    head = [
        "Method",
        *(f"{task}, {name}{' (lower is better)' if low else ''}" for task, (name, low) in board.metrics.items()),
    ]
    rows = [[line.label, *(cell(i, task) for task in board.tasks)] for i, line in enumerate(board.lines)]
    return Tabulation(f"Scores of {board.model}: mean ± standard deviation (runs)", head, rows)


def _details(board: Board, task: str) -> Tabulation:
    """Difference, costs and forgetting on one task. Columns that are empty everywhere are left out."""
    head = ["Method", "Difference from the reference", *COSTS.values(), "Forgetting"]
    rows = []
    for line, result in board.of(task):
        apart, lost = result.apart, result.forgetting
        gap = "" if apart is None else f"{signed(apart.mean)} {interval(apart, sign=True)}".strip()
        costs = [size(name, result.costs[name]) if name in result.costs else "" for name in COSTS]
        rows.append([line.label, gap, *costs, "" if lost is None else f"{signed(lost.mean)}{spread(lost)}"])
    full = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    return Tabulation(
        f"{task} on {board.model}: differences with 95 % intervals, and costs",
        [head[i] for i in full],
        [[row[i] for i in full] for row in rows],
    )


def _commands(shown: Shown) -> list[str]:
    return [
        f"* {_md(line.label)} on {_md(result.task)}, seed {run.seed}, run {_md(run.run)}: `{_code(run.command)}`"
        for board in shown.boards
        for line in board.lines
        for result in line.results.values()
        if result is not None
        for run in result.runs
    ]


def _md(text: str) -> str:
    r"""A text that Markdown shows as it is.

    >>> print(_md("a|b <script> *x*"))
    a\|b \<script\> \*x\*
    """
    return re.sub(r"([\\`*_\[\]<>|#&~$])", r"\\\1", _line(text))


def _code(text: str) -> str:
    return _line(text).replace("`", "'")


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _md_table(table: Tabulation) -> str:
    bar = "|---|" + "---:|" * (len(table.head) - 1)
    rows = ["| " + " | ".join(map(_md, row)) + " |" for row in (table.head, *table.rows)]
    return "\n".join([f"**{_md(table.caption)}**", "", rows[0], bar, *rows[1:]])


def tex(text: str) -> str:
    r"""A text that LaTeX sets as it is.

    >>> print(tex("id3_x at 0.17 % & −0.5"))
    id3\_x at 0.17 \% \& $-$0.5
    """
    return "".join(_TEX.get(letter, letter) for letter in _line(text))


def _tex_table(table: Tabulation) -> str:
    rows = [" & ".join(map(tex, row)) + r" \\" for row in (table.head, *table.rows)]
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{tex(table.caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule", rows[0], r"\midrule", *rows[1:],
        r"\bottomrule", r"\end{tabular}", r"\end{table}",
    ])  # fmt: skip
