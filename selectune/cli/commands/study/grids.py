"""`selectune study run|plan|status|show|export`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from selectune.cli import signals
from selectune.cli.exits import FAILED
from selectune.cli.options import Json, option
from selectune.cli.output import result, stderr, working
from selectune.errors import ConfigError

if TYPE_CHECKING:
    from selectune.study.cells import Cell
    from selectune.study.grid import Grid
    from selectune.study.runner import Counts
    from selectune.study.summary import Forecast, Status
    from selectune.study.workspace import Failure, Workspace

RUN_EXAMPLES = (
    "Examples:\n\nselectune study run grid.yaml --out studies/x --workers 2\n\n"
    "selectune study run core --out studies/core"
)
ENGINES = ("local", "ray")
app = typer.Typer(
    help="Run a grid of models, tasks, methods, budgets and seeds, and read its results.", no_args_is_help=True
)

GridFile = Annotated[str, typer.Argument(help="A YAML or JSON file, or the name of a study that ships with selectune.")]
Twin = Annotated[bool, typer.Option("--twin", help="The small form of the study, as its file has it.")]
Folder = Annotated[str, typer.Argument(help="The folder of a study.")]
Rule = Annotated[str, typer.Option(help="A run's score: last, the saved delta's, or best of all its evaluations.")]


@app.command("run", epilog=RUN_EXAMPLES)
def run(
    grid: GridFile,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of the study; the same one goes on.")],
    twin: Twin = False,
    workers: Annotated[int, typer.Option(help="Cells at a time.")] = 1,
    threads: Annotated[
        int | None, option("Threads of a cell. Default: an equal share of the processors; 1 under Ray.")
    ] = None,
    retries: Annotated[int, typer.Option(help="Further attempts at a cell whose process died.")] = 1,
    most: Annotated[int | None, option("Run at most so many cells now.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: a Ray cluster.")] = "local",
    address: Annotated[str | None, option("The Ray cluster; default: one of this machine.")] = None,
    gpus: Annotated[float, typer.Option(help="GPUs of a cell, under --engine ray.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Run the cells of a grid that are not done yet, each in a process of its own."""
    for name, value, least in (
        ("workers", workers, 1),
        ("threads", 1 if threads is None else threads, 1),
        ("retries", retries, 0),
        ("most", 1 if most is None else most, 1),
        ("gpus", gpus, 0),
    ):
        if value < least:
            raise ConfigError(f"--{name} {value}: must be at least {least}.")
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: known are {', '.join(ENGINES)}.")
    if engine == "local" and (address is not None or gpus):
        raise ConfigError("--address and --gpus are for --engine ray; local cells see this machine's GPUs.")
    from selectune.runs.stop import Stop

    stop = Stop()
    with working():
        from selectune.study.engines import Local, Ray
        from selectune.study.grid import read_grid
        from selectune.study.runner import run_study
        from selectune.study.summary import status
        from selectune.study.workspace import begin

        workspace = begin(out, read_grid(grid, twin))
        signals.heed(stop)
        executor = Local(workers, threads) if engine == "local" else Ray(address, workers, threads or 1, gpus)
        counts = run_study(workspace, executor, retries, _Live(), stop, most)
        found = status(workspace)
    result(as_json, found.as_json(), _told(workspace, found))
    if counts.failed or (counts.waiting and most is None):
        raise typer.Exit(FAILED)


@app.command("plan")
def plan(
    grid: GridFile,
    twin: Twin = False,
    out: Annotated[str | None, option("Take times from the cells that are done in this folder.", "--out", "-o")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Cells at a time.")] = 1,
    as_json: Json = False,
) -> None:
    """Say how many cells a grid has, and how long and how much memory they will take."""
    with working():
        from selectune.study.grid import read_grid
        from selectune.study.summary import forecast
        from selectune.study.workspace import Workspace

        found = forecast(read_grid(grid, twin), () if out is None else Workspace(out).records())
    result(as_json, found.as_json(), _forecast(found, workers))


@app.command("status")
def status_of(folder: Folder, as_json: Json = False) -> None:
    """Say what is done, what is left and what failed."""
    from selectune.study.summary import status
    from selectune.study.workspace import Workspace

    workspace = Workspace(folder)
    found = status(workspace)
    result(as_json, found.as_json(), _told(workspace, found, table=False))


@app.command("show")
def show(folder: Folder, rule: Rule = "last", as_json: Json = False) -> None:
    """Print a table: a row for each method, a column for each task, mean ± standard deviation (runs)."""
    if rule not in ("last", "best"):
        raise ConfigError(f"--rule {rule}: known are last and best.")
    from selectune.study.summary import table
    from selectune.study.workspace import Workspace

    columns, rows = table(Workspace(folder).records(), rule)
    result(as_json, [dict(zip(columns, row, strict=True)) for row in rows], aligned(columns, rows))


@app.command("export")
def export(
    folder: Folder,
    out: Annotated[str, typer.Option("--out", "-o", help="A .parquet, .csv or .jsonl file.")],
    as_json: Json = False,
) -> None:
    """Write all results as one table, a row for each evaluation."""
    from selectune.study.summary import export as write
    from selectune.study.workspace import Workspace

    records = Workspace(folder).records()
    write(records, Path(out))
    result(as_json, {"out": out, "results": len(records)}, f"{len(records):,} results in {out}")


def run_cells(grid: Grid, folder: str, workers: int, threads: int | None = None) -> str:
    """Runs the cells of a grid that are not done on this machine, and returns the study's folder."""
    from selectune.runs.stop import Stop
    from selectune.study.engines import Local
    from selectune.study.runner import run_study
    from selectune.study.workspace import begin

    stop = Stop()
    with working():
        workspace = begin(folder, grid)
        signals.heed(stop)
        run_study(workspace, Local(workers, threads), watcher=_Live(), stop=stop)
    return folder


def aligned(columns: list[str], rows: list[list[str]]) -> str:
    """A table in text.

    >>> print(aligned(["a", "bc"], [["long", "1"]]))
    a     bc
    long  1
    """
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [columns, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def _told(workspace: Workspace, found: Status, table: bool = True) -> str:
    from selectune.study.summary import table as table_of

    parts = [f"{found.name}: {found.done} cells done, {found.ready} to run, {found.waiting} wait for a rate"]
    if table and found.done:
        parts.append(aligned(*table_of(workspace.records())))
    if found.failures:
        parts.append(
            f"{len(found.failures)} attempts failed:\n" + "\n".join(f"  {why}" for why in found.failures[-10:])
        )
    if found.edges:
        parts.append(
            "The best rate is the lowest or the highest that was tried, so a better one may lie beyond:\n"
            + "\n".join(f"  {edge}" for edge in found.edges)
        )
    return "\n\n".join(parts)


def _forecast(found: Forecast, workers: int) -> str:
    cells = found.trials + found.runs
    lines = [f"{cells} cells: {found.trials} trials of rates, {found.runs} runs; {len(found.arms)} arms:"]
    lines += [f"  {arm}" for arm in found.arms]
    if found.seconds is None:
        lines.append("hours: not known before a cell of each task is done; --out reads the times of those that are")
    else:
        hours = found.seconds / 3600 / workers
        lines.append(
            f"about {hours:.1f} hours are left with --workers {workers}, by {found.measured} cells that are done"
        )
    if found.peak is not None:
        lines.append(f"{found.peak / 2**20:,.0f} MiB of live tensors in the largest cell, for each worker")
    return "\n".join(lines)


class _Live:
    """A table on stderr that follows the cells; in a file or a pipe, a line for each that ends."""

    def __init__(self) -> None:
        self._console, self._live = stderr(), None
        self._running: dict[str, tuple[str, float]] = {}  # by key
        self._counts: Counts | None = None
        self._last: list[str] = []
        self._began, self._done = time.monotonic(), 0

    def start(self, counts: Counts) -> None:
        self._counts = counts
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=2, transient=True)
            self._live.start()
        else:
            self._console.print(f"{counts.done} of {counts.all} cells are done")

    def began(self, cell: Cell) -> None:
        from selectune.study.workspace import told_of

        self._running[cell.key] = told_of(cell), time.monotonic()

    def ended(self, cell: Cell, failure: Failure | None, counts: Counts) -> None:
        from selectune.study.workspace import told_of

        took = time.monotonic() - self._running.pop(cell.key, ("", self._began))[1]
        self._counts, self._done = counts, self._done + 1
        how = "done" if failure is None else f"failed: {failure.kind}: {failure.why}"
        line = escape(f"{counts.done}/{counts.all}  {cell.phase}  {told_of(cell)}  {took:.0f} s  {how}")
        self._last = [*self._last[-7:], line]
        if self._live is None:
            self._console.print(line)

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _table(self) -> Any:
        from rich.table import Table

        counts, now = self._counts, time.monotonic()
        grid = Table.grid(padding=(0, 2))
        if counts is not None:
            left = counts.all - counts.done - counts.failed
            ahead = f", about {(now - self._began) / self._done * left / 60:.0f} min left" if self._done else ""
            grid.add_row(f"[bold]{counts.done}[/] of {counts.all} cells done, {counts.failed} failed{ahead}")
        for name, since in self._running.values():
            grid.add_row(f"[cyan]running[/]  {escape(name)}  {now - since:.0f} s")
        for line in self._last:
            grid.add_row(f"[dim]{line}[/]")
        return grid
