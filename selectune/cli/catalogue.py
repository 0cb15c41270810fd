"""The rows of `selectune methods` and `selectune tasks`. Two JSON files keep them, so that the lists need no torch.

`python -m selectune.cli.catalogue` writes these files again; a test asserts that they agree with the code.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("methods.json")
TASKS_FILE = Path(__file__).with_name("tasks.json")


def methods() -> list[dict[str, Any]]:
    """The methods in the file: recipes first, then adapters."""
    return _read(FILE)


def tasks() -> list[dict[str, Any]]:
    """The tasks in the file."""
    return _read(TASKS_FILE)


def _read(path: Path) -> list[dict[str, Any]]:
    from selectune.errors import SelectuneError
    from selectune.files import read_json

    return read_json(path, error=SelectuneError)


def task_row(name: str) -> dict[str, Any]:
    """The row of one task."""
    from selectune.tasks import TASKS

    task = TASKS[name]
    return {
        "name": task.name,
        "kind": task.kind.name,
        "metric": task.metric_name,
        "chance": task.chance,
        "epochs": task.epochs,
        "max_length": task.max_length,
        "source": task.source,
    }


def found_tasks() -> list[dict[str, Any]]:
    """Our tasks in the code."""
    from selectune.plugins import TASKS as GROUP
    from selectune.plugins import source_of
    from selectune.tasks import TASKS

    return [task_row(name) for name in TASKS if source_of(GROUP, name) is None]


def found() -> list[dict[str, Any]]:
    """The methods in the code."""
    from selectune.adapters import KINDS, make
    from selectune.recipes import RECIPES

    adapters = [
        {
            "name": kind.name,
            "summary": kind.summary,
            "reads": "nothing",
            "passes": "none",
            "bytes": "16 a scalar of the adapter",
            "source": kind.source,
            "takes": list(kind.options),
            "options": dict(make(kind.name, {}).options),
            "doc": "\n".join(f"{name}: {option.allowed}" for name, option in kind.options.items()),
            "through": "peft" if kind.peft else "selectune",
            "on": kind.on,
            "lr": kind.lr,
            "lr_source": kind.lr_source,
        }
        for kind in KINDS.values()
    ]
    return [*(row(name) for name in RECIPES), *adapters]


def row(name: str) -> dict[str, Any]:
    """The row of one recipe."""
    from selectune.recipes import RECIPES
    from selectune.recipes.named import parameters

    recipe = RECIPES[name]
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "reads": recipe.reads,
        "passes": recipe.passes,
        "bytes": recipe.bytes,
        "source": recipe.source,
        "takes": [name for name in inspect.signature(recipe.function).parameters if name != "steps"],
        "options": {name: parameter.default for name, parameter in parameters(recipe).items()},
        "doc": inspect.getdoc(recipe.function),
    }


def written(rows: list[dict[str, Any]]) -> str:
    """The text that a file of these rows must have."""
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(written(found()), encoding="utf-8")
    TASKS_FILE.write_text(written(found_tasks()), encoding="utf-8")
