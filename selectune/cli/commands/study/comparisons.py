"""`selectune compare`."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectune.cli.options import Json, KindOption, Label, Text, Validation, option
from selectune.cli.output import result
from selectune.errors import ConfigError, StudyError, did_you_mean
from selectune.spec import names

if TYPE_CHECKING:
    from selectune.study.comparing.standing import Comparison
    from selectune.study.records import Items, Record

EXAMPLES = """Examples:

selectune compare --train my.csv --validation dev.csv --text question --label topic --methods id3,lora:r=8,full

selectune compare --question static-vs-dynamic --against random --folder studies/question

selectune compare studies/core --against lora:r=8

selectune compare studies/core --against best --methods id3 --pairing papers --rule best --out table.tex
"""
NEW = "To run first"
_WIDTH = 160  # columns of a table that goes to a file or a pipe


def compare(
    studies: Annotated[
        list[str] | None, typer.Argument(help="Folders of studies, or files of results (.jsonl).", show_default=False)
    ] = None,
    against: Annotated[
        str | None,
        option(
            "The reference: a method, or 'best' for the best baseline of each task. Default: the last of --methods.",
            "--against",
        ),
    ] = None,
    methods: Annotated[
        str | None, option("The methods to compare, with a comma between them. Default: all.", "--methods")
    ] = None,
    rule: Annotated[
        str, typer.Option("--rule", help="The score of a run: last, of the saved delta; or best, of its evaluations.")
    ] = "last",
    pairing: Annotated[
        str, typer.Option("--pairing", help="seed: runs of one seed; papers: each run with each run.")
    ] = "seed",
    alpha: Annotated[float, typer.Option("--alpha", help="The level of the tests; intervals have 1 - alpha.")] = 0.05,
    alternative: Annotated[
        str,
        typer.Option("--alternative", help="Is the method better than the reference? greater, less or two-sided."),
    ] = "greater",
    question: Annotated[
        str | None, option("Run this study first: a name that ships, or a file; see `selectune study`.", panel=NEW)
    ] = None,
    task: Annotated[str | None, option("Run the methods on this task first.", "--task", "-t", panel=NEW)] = None,
    train: Annotated[str | None, option("Run the methods on these rows first.", "--train", panel=NEW)] = None,
    validation: Validation = None,
    text: Text = None,
    label: Label = None,
    kind: KindOption = None,
    hold_out: Annotated[float | None, option("Share of the training rows to measure on: 0.1.", panel=NEW)] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="The base.", rich_help_panel=NEW)] = "demo",
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="Scalars: 103k or 0.17%.", rich_help_panel=NEW)
    ] = "0.17%",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.", rich_help_panel=NEW)] = 3,
    epochs: Annotated[float | None, option("Passes over the data. Default: the task's.", panel=NEW)] = None,
    max_steps: Annotated[int | None, option("Optimizer steps, in place of --epochs.", panel=NEW)] = None,
    search: Annotated[
        bool, typer.Option("--search/--no-search", help="Search each method's rate first.", rich_help_panel=NEW)
    ] = True,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.", rich_help_panel=NEW)] = 1,
    folder: Annotated[
        str | None, option("The study's folder; the same one goes on. Default: studies/compare.", "--folder", panel=NEW)
    ] = None,
    out: Annotated[str | None, option("Also write the tables to this file: .md, .tex or .csv.", "--out", "-o")] = None,
    as_json: Json = False,
) -> None:
    """Compare methods with a reference: differences, intervals, tests, and their warnings.

    The methods are those of finished studies, or are run first: on rows of your own, a task, or a question.
    """
    from selectune.files import write_durably
    from selectune.study import compare as study
    from selectune.study.comparing import layouts

    form = Path(out or ".md").suffix
    if form not in layouts.WRITERS and out is not None:
        known = ", ".join(layouts.WRITERS)
        raise ConfigError(f"--out {out}: the name must end with one of {known}.{did_you_mean(form, layouts.WRITERS)}")
    asked = question or task or train
    if bool(asked) == bool(studies):
        raise ConfigError(
            "Name studies that are finished, or say what to run: --train FILE, --task TASK or --question STUDY."
        )
    if asked:
        where = {"task": task} if task else {"train": train, "validation": validation, "text": text}
        where |= {"label": label, "kind": kind, "hold_out": hold_out}
        told = {"max_steps": max_steps, "epochs": epochs, "budget": budget, "model": model, "seeds": seeds}
        studies = [_run(question, where, names(methods or ""), told, search, folder or "studies/compare", workers)]
    records, items = _read(studies or [])
    if against is None:
        if not methods:
            raise ConfigError("--against is missing: the reference, a method of these results, or 'best'.")
        against = names(methods)[-1]
    found = study.compare(
        records,
        against,
        methods=names(methods or ""),
        rule=rule,  # pyright: ignore[reportArgumentType]
        pairing=pairing,  # pyright: ignore[reportArgumentType]
        alpha=alpha,
        alternative=alternative,  # pyright: ignore[reportArgumentType]
        items=items,
    )
    if out is not None:
        write_durably(out, layouts.WRITERS[form](found).encode())
    result(as_json, found.as_json(), shown(found))


def _run(
    question: str | None,
    where: dict[str, Any],
    methods: Sequence[str],
    told: dict[str, Any],
    search: bool,
    folder: str,
    workers: int,
) -> str:
    """Runs the study that the options describe, and returns its folder."""
    from selectune.cli.commands.study.grids import run_cells
    from selectune.runs.config import patterns
    from selectune.study.grid import of_mapping, read_grid

    where |= {"text": patterns(where.get("text"))}
    if question is not None:
        return run_cells(read_grid(question), folder, workers)
    if len(methods) < 2:
        raise ConfigError("--methods must name at least two methods, such as --methods id3,lora:r=8,full.")
    grid = {
        "name": "compare",
        "models": [told["model"]],
        "tasks": [{name: value for name, value in where.items() if value not in (None, ())}],
        "methods": list(methods),
        "budgets": [told["budget"]],
        "seeds": list(range(1, told["seeds"] + 1)),
        "settings": {name: told[name] for name in ("max_steps", "epochs") if told[name] is not None},
    }
    if search:
        grid["search"] = {"factors": [1, 4, 16], "seeds": [100]}
    return run_cells(of_mapping(grid, "selectune compare"), folder, workers)


def _read(studies: Sequence[str]) -> tuple[list[Record], dict[str, Items]]:
    """The results of studies, and what their runs said of each row, where the folders of cells are there."""
    from selectune.files.reading import read_json
    from selectune.study.records import ITEMS, RESULTS, Items, read_results

    records: list[Record] = []
    items: dict[str, Items] = {}
    for study in studies:
        path, whole = Path(study), (Path(study) / "study.json").exists()
        path = path / RESULTS if path.is_dir() else path
        if not path.exists():
            raise StudyError(f"{study} is no study: there is no {path.name} there. Give its folder, or a .jsonl file.")
        new = read_results(path)
        if whole:  # a grid that has changed leaves out the cells of others
            from selectune.study.workspace import Workspace

            new = Workspace(study).records()
        records += new
        for cell in dict.fromkeys(record.cell for record in new if record.last and record.phase == "main"):
            for file in path.parent.glob(f"*/{cell}/{ITEMS}"):
                try:
                    items[cell] = Items.of_json(read_json(file, limit=2**28, error=StudyError))
                except TypeError as why:
                    raise StudyError(f"{file} does not hold the scores of rows: {why}.") from why
    return records, items


def shown(comparison: Comparison) -> str:
    """The tables of a comparison for a terminal, and its warnings."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from selectune.study.comparing import layouts

    file = io.StringIO()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH
    console = Console(file=file, width=width, highlight=False, emoji=False)
    tasks = list(dict.fromkeys(standing.task for standing in comparison.standings))
    parts = [("mean ± spread (runs)", layouts.scores(comparison))] * (len(tasks) > 1)
    parts += [(layouts.title(comparison, task), layouts.details(comparison, task)) for task in tasks]
    for title, (header, rows) in parts:
        table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
        for at, name in enumerate(header):
            table.add_column(name, justify="right" if at else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        console.print()
    tables = "\n".join(line.rstrip() for line in file.getvalue().splitlines())
    return "\n".join([tables, layouts.legend(comparison), *(f"! {warning}" for warning in comparison.warnings)])
