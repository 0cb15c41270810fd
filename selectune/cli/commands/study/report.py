"""`selectune report` writes the page of a study or of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selectune.cli.options import Json, option
from selectune.cli.output import result, working
from selectune.errors import ConfigError

EXAMPLES = (
    "Examples:  selectune report studies/rte\n\n"
    "selectune report runs/rte --out rte.html\n\n"
    "selectune report studies/rte --format tex --against lora:r=8 --out -"
)
FORMATS = ("html", "md", "tex")


def report(
    folder: Annotated[str, typer.Argument(help="The folder of a study, or of a run that train wrote.")],
    form: Annotated[
        str, typer.Option("--format", help="html: a page; md or tex: its tables for a text (LaTeX with booktabs).")
    ] = "html",
    out: Annotated[str | None, option("The file. Default: report.html in the folder; - is stdout.", "--out")] = None,
    against: Annotated[
        str | None, option("The method that others are compared with. Default: full, or the first.", "--against")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write what was asked, the answer with intervals, scores, costs, maps and timelines as one page."""
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: there is no such format. Known: {', '.join(FORMATS)}.")
    from selectune.files import write_durably
    from selectune.study import report as made

    with working():
        shown = made.content(made.gather(Path(folder)), against)
        text = made.FORMATS[form](shown)
    if out == "-":
        typer.echo(text, nl=False)
        return
    path = Path(folder) / f"report.{form}" if out is None else Path(out)
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {path.absolute().parent} does not exist.")
    data = text.encode("utf-8", "replace")
    write_durably(path, data)
    told = {"out": str(path), "bytes": len(data), "answer": list(shown.answer)}
    result(as_json, told, "\n".join([*shown.answer, f"{path} ({len(data):,} bytes)"]))
