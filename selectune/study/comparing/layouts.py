"""A comparison as text: a table of scores, a table of differences, and the warnings; Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from selectune.study.comparing.standing import Comparison, Standing
from selectune.study.records import size_of
from selectune.study.stats.intervals import Interval

Table = tuple[list[str], list[list[str]]]
"""The names of the columns, and rows of cells."""

NO = "-"
_LATEX = {letter: "\\" + letter for letter in "&%$#_{}"} | {
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "²": "$^2$",
    "<": "$<$",
    ">": "$>$",
}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def named(standing: Standing, among: Sequence[Standing]) -> str:
    """A method with its budget and model, where the table has several of them.

    The budgets of one method, tested together, are named by their number.
    """
    if standing.pooled:
        return f"{standing.method}, all {len(standing.settings)} settings"
    setting = standing.settings[0]
    alone = [s.settings[0] for s in among if not s.pooled]
    parts = [standing.method]
    if len({s.budget for s in alone if s.label == standing.method}) > 1:
        parts.append(f"budget {size_of(setting.budget)}")
    if len({s.model for s in alone}) > 1:
        parts.append(setting.model)
    return ", ".join(parts)


def score(standing: Standing) -> str:
    """Mean and spread."""
    spread = standing.spread
    return f"{spread.mean:.4f}" + (f" ± {spread.sd:.4f}" if spread.sd is not None else "")


def p_value(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def scores(comparison: Comparison) -> Table:
    """Method by task: mean ± spread, runs; and the mean of all tasks, where they agree on what is better.

    An asterisk: better than the reference, by the p that is corrected; a dagger: worse.
    """
    rows: dict[str, dict[str, Standing]] = {}
    alone = [standing for standing in comparison.standings if not standing.pooled]
    for standing in alone:
        rows.setdefault(named(standing, alone), {})[standing.task] = standing
    tasks = list(dict.fromkeys(standing.task for standing in alone))
    averaged = len(tasks) > 1 and len({standing.lowest for standing in alone}) == 1
    table = []
    for name, of in rows.items():
        cells = [_cell(of[task], comparison.alpha) if task in of else NO for task in tasks]
        if averaged:
            whole = len(of) == len(tasks)
            cells.append(f"{sum(s.spread.mean for s in of.values()) / len(of):.4f}" if whole else NO)
        table.append([name, *cells])
    return ["method", *tasks, *(["mean"] if averaged else [])], table


def _cell(standing: Standing, alpha: float) -> str:
    found, mark = standing.difference, ""
    if found is not None and found.holm <= alpha:
        mark = " *" if (found.mean < 0) == standing.lowest else " †"
    return f"{score(standing)} ({standing.spread.n}){mark}"


DETAILS = (
    "method", "score", "runs", "difference", "interval", "W+ (n)", "p", "Holm p", "permutation p", "d", "detectable"
)  # fmt: skip
OVER_ROWS = "interval over seeds and rows"


def details(comparison: Comparison, task: str) -> Table:
    """What was found of every method on a task."""
    here = [standing for standing in comparison.standings if standing.task == task]
    rows = [[named(s, here), score(s), str(s.spread.n), *_difference(s)] for s in here]
    over = [s.difference and s.difference.over_items for s in here]
    if not any(over):
        return list(DETAILS), rows
    return [*DETAILS, OVER_ROWS], [[*row, _interval(found)] for row, found in zip(rows, over, strict=True)]


def _difference(standing: Standing) -> list[str]:
    if (found := standing.difference) is None:
        return [NO] * (len(DETAILS) - 3)
    return [
        f"{found.mean:+.4f}",
        _interval(found.interval),
        f"{found.test.statistic:g} ({found.test.n})",
        p_value(found.test.p),
        p_value(found.holm),
        p_value(found.permutation.p),
        NO if found.cohen is None else f"{found.cohen:+.2f}",
        NO if found.detectable is None else f"{found.detectable:.4f}",
    ]


def _interval(found: Interval | None) -> str:
    return NO if found is None else f"{found.low:+.4f} to {found.high:+.4f}"


def title(comparison: Comparison, task: str) -> str:
    """A task, its metric, its reference, and whether its methods differ at all."""
    first = next(standing for standing in comparison.standings if standing.task == task)
    text = f"{task}: {first.metric}{', lower is better' if first.lowest else ''}; against {comparison.against[task]}"
    for name, found in comparison.anova.items():
        if name == task or name.startswith(f"{task} with "):
            model = name.removeprefix(task)
            text += f"; ANOVA{model} F {found.f:.2f}, p {p_value(found.p)}, eta² {found.eta_squared:.2f}"
    return text


def legend(comparison: Comparison) -> str:
    """What the columns are."""
    pairs = "runs of one seed" if comparison.pairing == "seed" else "each run with each run"
    what = {"greater": "is better than", "less": "is worse than", "two-sided": "differs from"}[comparison.alternative]
    interval = "Student's" if comparison.pairing == "seed" else "Welch's"
    p = "Wilcoxon's" if comparison.pairing == "seed" else "the permutation's"
    marks = {"greater": "*: better than the reference", "less": "†: worse than the reference"}
    mark = marks.get(comparison.alternative, "*: better than the reference, †: worse")
    return (
        f"Score: mean ± standard deviation of the {comparison.rule} scores of runs. Pairs: {pairs}. p: Wilcoxon's, "
        f"that the method {what} the reference; Holm's correction, of {p} p, is over the methods of a task. "
        f"{mark}, by that p at {comparison.alpha:g}. Interval: "
        f"{100 * (1 - comparison.alpha):g} %, {interval}; over seeds and rows, by the bootstrap. d: Cohen's. "
        f"Detectable: the smallest true difference that a t-test at {comparison.alpha:g} would have seen with 80 % "
        "power, by the noncentral t."
    )


def markdown(comparison: Comparison) -> str:
    def table(of: Table) -> str:
        header, rows = of
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    parts = [table(scores(comparison))]
    for task in dict.fromkeys(standing.task for standing in comparison.standings):
        parts += [f"**{title(comparison, task)}**", table(details(comparison, task))]
    warnings = "\n".join(f"- {warning}" for warning in comparison.warnings)
    return "\n\n".join([*parts, legend(comparison), warnings]) + "\n"


def latex(comparison: Comparison) -> str:
    """Tables for the package booktabs."""

    def escaped(text: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in text)

    def table(of: Table, caption: str) -> str:
        header, rows = of
        lines = [" & ".join(map(escaped, line)) + r" \\" for line in [header, *rows]]
        body = "\n".join([lines[0], r"\midrule", *lines[1:]])
        return (
            f"\\begin{{table}}\n\\caption{{{escaped(caption)}}}\n\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}\n"
            f"\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n\\end{{table}}"
        )

    parts = [table(scores(comparison), legend(comparison))]
    for task in dict.fromkeys(standing.task for standing in comparison.standings):
        parts.append(table(details(comparison, task), title(comparison, task)))
    return "\n\n".join([*parts, "\n".join(f"% {warning}" for warning in comparison.warnings)]) + "\n"


def comma_separated(comparison: Comparison) -> str:
    """A line for each method and task, with all digits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = (
        "task metric method models budgets mean sd runs against difference low high w n zeros p holm permutation_p "
        "smallest_p cohen_d cliff_delta detectable".split()
    )
    writer.writerow(columns)
    for s in comparison.standings:
        row = [s.task, s.metric, s.method]
        row += [";".join(dict.fromkeys(setting.model for setting in s.settings))]
        row += [";".join(dict.fromkeys(str(setting.budget or "") for setting in s.settings))]
        row += [s.spread.mean, s.spread.sd, s.spread.n]
        if d := s.difference:
            interval = (d.interval.low, d.interval.high) if d.interval else (None, None)
            row += [d.against, d.mean, *interval, d.test.statistic, d.test.n, d.test.zeros, d.test.p, d.holm]
            row += [d.permutation.p, d.smallest, d.cohen, d.cliff, d.detectable]
        writer.writerow(row + [None] * (len(columns) - len(row)))
    return file.getvalue()


WRITERS: dict[str, Callable[[Comparison], str]] = {".md": markdown, ".tex": latex, ".csv": comma_separated}
