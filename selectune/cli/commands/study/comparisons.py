"""`selectune compare`."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selectune.cli.options import Json, option
from selectune.cli.output import result
from selectune.errors import ConfigError, StudyError, did_you_mean

if TYPE_CHECKING:
    from selectune.study.comparing.standing import Comparison
    from selectune.study.records import Items, Record

EXAMPLES = """Examples:

selectune compare studies/core --against lora:r=8

selectune compare studies/core --against best --methods id3 --pairing papers --rule best --out table.tex
"""
_WIDTH = 160  # columns of a table that goes to a file or a pipe


def compare(
    studies: Annotated[
        list[str], typer.Argument(help="Folders of studies, or files of results (.jsonl).", show_default=False)
    ],
    against: Annotated[
        str, typer.Option("--against", help="The reference: a method, or 'best' for the best baseline of each task.")
    ],
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
    out: Annotated[str | None, option("Also write the tables to this file: .md, .tex or .csv.", "--out", "-o")] = None,
    as_json: Json = False,
) -> None:
    """Compare the methods of finished studies with a reference: differences, intervals, tests, and their warnings."""
    from selectune.files import write_durably
    from selectune.study import compare as study
    from selectune.study.comparing import layouts

    kind = Path(out or ".md").suffix
    if kind not in layouts.WRITERS and out is not None:
        known = ", ".join(layouts.WRITERS)
        raise ConfigError(f"--out {out}: the name must end with one of {known}.{did_you_mean(kind, layouts.WRITERS)}")
    records, items = _read(studies)
    found = study.compare(
        records,
        against,
        methods=_listed(methods),
        rule=rule,  # pyright: ignore[reportArgumentType]
        pairing=pairing,  # pyright: ignore[reportArgumentType]
        alpha=alpha,
        alternative=alternative,  # pyright: ignore[reportArgumentType]
        items=items,
    )
    if out is not None:
        write_durably(out, layouts.WRITERS[kind](found).encode())
    result(as_json, found.as_json(), shown(found))


def _listed(methods: str | None) -> list[str]:
    """`id3:exp=1,every=10,lora:r=8`: a comma before an option belongs to the method before it."""
    found: list[str] = []
    for part in (methods or "").split(","):
        if found and "=" in part and ":" not in part:
            found[-1] += f",{part}"
        elif part.strip():
            found.append(part.strip())
    return found


def _read(studies: Sequence[str]) -> tuple[list[Record], dict[str, Items]]:
    """The results of studies, and what their runs said of each row, where the folders of cells are there."""
    from selectune.files.reading import read_json
    from selectune.study.records import ITEMS, RESULTS, Items, read_results

    records: list[Record] = []
    items: dict[str, Items] = {}
    for study in studies:
        path = Path(study)
        path = path / RESULTS if path.is_dir() else path
        if not path.exists():
            raise StudyError(f"{study} is no study: there is no {path.name} there. Give its folder, or a .jsonl file.")
        records += (new := read_results(path))
        for cell in dict.fromkeys(record.cell for record in new if record.last and record.phase == "main"):
            for file in path.parent.glob(f"*/{cell}/{ITEMS}"):
                try:
                    items[cell] = Items(**read_json(file, limit=2**28, error=StudyError))
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
    parts = [("mean ± spread (runs); * passes with Holm's correction", layouts.scores(comparison))] * (len(tasks) > 1)
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
