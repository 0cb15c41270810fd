"""The message about a wrong command line: one line, with the nearest known name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from selectune.errors import did_you_mean

# Typer brings its own copy of click from 0.2x on; its usage errors have a base that this public class has too.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def explained(error: Any) -> str:
    """The message of a usage error, with the command whose help to read."""
    context = error.ctx
    name = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and name is not None:
        known = [] if context is None else [o for parameter in context.command.params for o in parameter.opts]
        text = f"There is no option {name}.{did_you_mean(name, [o for o in known if o.startswith('--')])}"
    else:
        text = error.format_message()
        text = text if text.endswith((".", "?")) else f"{text}."
    return text if context is None else f"{text} See {context.command_path} --help."


def wants_json(args: Sequence[str]) -> bool:
    """True if a command line asks for JSON on stdout, even if the rest of it is wrong.

    >>> wants_json(["tasks", "--json"]), wants_json(["bench", "--json", "rows.json"]), wants_json(["bench", "--json=-"])
    (True, False, True)
    """
    mine = args[: args.index("--")] if "--" in args else args
    if "--json" not in mine:
        return "--json=-" in mine
    return "bench" not in mine[:2] or mine[mine.index("--json") + 1 :][:1] == ["-"]
