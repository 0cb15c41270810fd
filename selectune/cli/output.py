"""Where things are printed: results on stdout, progress, log and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from selectune.errors import SelectuneError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from selectune.runs.training import Update

TRACEBACK = "SELECTUNE_TRACEBACK"
BETWEEN_LINES = 30.0  # seconds, where progress is written in lines


def stderr() -> Console:
    """A console on stderr that never wraps, so that an error stays one line."""
    return Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def fail(error: SelectuneError | OSError, code: int, as_json: bool) -> None:
    """Says why a command ends with this code; with SELECTUNE_TRACEBACK=1 raises the error instead."""
    if os.environ.get(TRACEBACK, "") not in ("", "0"):
        raise error
    refuse(str(error), type(error).__name__, code, as_json)


def refuse(text: str, kind: str, code: int, as_json: bool) -> None:
    """Prints why not: a red line on stderr, broken between words on a terminal; and JSON on stdout if it was asked for.
    What was stopped on purpose is no error, and yellow.

    Characters that would steer a terminal, as in the name of a hostile file, are escaped.
    """
    text = " ".join(text.split())
    label, colour = ("stopped:", "yellow") if kind == "Stopped" else ("error:", "red")
    line = f"{label} " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if sys.stderr.isatty():
        line = fitted(line, shutil.get_terminal_size().columns)
    stderr().print(f"[bold {colour}]{label}[/][{colour}]{escape(line.removeprefix(label))}[/]")
    if as_json:
        typer.echo(json.dumps({"error": {"kind": kind, "message": text, "exit": code}}, indent=2))


def result(as_json: bool, value: Any, text: str) -> None:
    """Prints a result on stdout: JSON if it was asked for, else the text."""
    if not as_json and sys.stdout.isatty():
        text = fitted(text, shutil.get_terminal_size().columns)
    typer.echo(json.dumps(value, indent=2, allow_nan=False) if as_json else text)


def fitted(text: str, columns: int) -> str:
    """Long lines broken between words; what follows is indented.

    >>> print(fitted("  one two three", 10))
      one two
          three
    """
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        lines += textwrap.wrap(
            line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]  # fmt: skip
    return "\n".join(lines)


@contextlib.contextmanager
def working() -> Iterator[None]:
    """While a command works, whatever a library prints goes to stderr, so that stdout holds the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def log_to_stderr(verbose: bool) -> None:
    """Sends selectune's own log to stderr: warnings, and with `verbose` what is going on."""
    logger = logging.getLogger("selectune")
    for old in [h for h in logger.handlers if isinstance(h, _Handler)]:
        logger.removeHandler(old)
    logger.addHandler(_Handler())
    logger.setLevel(logging.INFO if verbose else logging.WARNING)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        stderr().print(f"[{style}]{record.levelname.lower()}:[/] {escape(record.getMessage())}")


class ProgressBar:
    """Progress on stderr: loss, selected/budget, steps a second, metric. A bar on a terminal; a line now and then in
    a file or a pipe.
    """

    def __init__(self) -> None:
        self._title = ""
        self._said = 0.0
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began = 0.0

    def start(self, title: str, steps: int) -> None:
        self._began = self._said = time.perf_counter()
        if not self._console.is_terminal:
            self._title = title
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(title, total=steps, state="")

    def update(self, update: Update) -> None:
        now = time.perf_counter()
        rate = update.step / max(now - self._began, 1e-9)
        if self._bar is None or self._task is None:
            if self._title and now - self._said >= BETWEEN_LINES:
                self._said = now
                stderr().print(escape(f"{self._title}: {update.step}/{update.steps}  {state_line(update, rate)}"))
            return
        self._bar.update(self._task, completed=update.step, state=state_line(update, rate))

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._title = None, ""


def state_line(update: Update, rate: float) -> str:
    """What stands beside the bar.

    >>> from selectune.runs.training import Update
    >>> state_line(Update(10, 100, 0.5, 40, 400, None), 2.5)
    'loss 0.5000  40/400 selected  2.5 steps/s'
    """
    parts = [] if update.loss is None else [f"loss {update.loss:.4f}"]
    if update.budget:
        parts.append(f"{update.selected:,}/{update.budget:,} selected")
    parts.append(f"{rate:.1f} steps/s")
    if update.metric is not None:
        parts.append(f"metric {update.metric:.4f}")
    return "  ".join(parts)
