"""The rows of `selectune methods`, from RECIPES and KINDS. methods.json keeps them, so that the list needs no torch.

`python -m selectune.cli.catalogue` writes that file again; a test asserts that it agrees with the code.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("methods.json")


def methods() -> list[dict[str, Any]]:
    """The methods in the file: recipes first, then adapters."""
    from selectune.errors import SelectuneError
    from selectune.files import read_json

    return read_json(FILE, error=SelectuneError)


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


def written() -> str:
    """The text that the file must have."""
    return json.dumps(found(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
