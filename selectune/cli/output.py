"""Results go to stdout; progress, log and errors go to stderr."""

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

    from selectune.runs.result import Update

TRACEBACK = "SELECTUNE_TRACEBACK"
BETWEEN_LINES = 30.0  # seconds between two lines of progress in a file or a pipe


def stderr() -> Console:
    """A console on stderr that never wraps, so that an error stays one line."""
    return Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def fail(error: SelectuneError | OSError, code: int, as_json: bool) -> None:
    """Prints the reason why a command fails; with SELECTUNE_TRACEBACK=1 raises the error instead."""
    if os.environ.get(TRACEBACK, "") not in ("", "0"):
        raise error
    refuse(str(error), type(error).__name__, code, as_json)


def refuse(text: str, kind: str, code: int, as_json: bool) -> None:
    """Prints a reason as one red line on stderr, and as JSON on stdout if that was asked for.

    On a terminal the line is broken between words. A stop on purpose is yellow, because it is not an error. Characters
    that would steer a terminal, as in the name of a hostile file, are escaped.
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
    """Prints a result on stdout, as JSON or as text."""
    if not as_json and sys.stdout.isatty():
        text = fitted(text, shutil.get_terminal_size().columns)
    typer.echo(json.dumps(value, indent=2, allow_nan=False) if as_json else text)


def fitted(text: str, columns: int) -> str:
    """Breaks long lines between words and indents the rest.

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
    """Within it, prints of libraries go to stderr, so that stdout holds only the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def log_to_stderr(verbose: bool) -> None:
    """Sends selectune's log to stderr: warnings, and with `verbose` also information."""
    for chatty in ("torch.utils", "torchao", "bitsandbytes"):  # as peft imports them, used or not
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
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
    """Progress on stderr: a bar on a terminal, and a line now and then in a file or a pipe."""

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
    """The text beside the bar.

    >>> from selectune.runs.result import Update
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
