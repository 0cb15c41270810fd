"""What `selectune methods` lists, from RECIPES and KINDS, kept in methods.json so that the list needs no torch.

`python -m selectune.cli.catalogue` writes that file anew; a test asserts that it is what the code says.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("methods.json")


def methods() -> list[dict[str, Any]]:
    """The methods as the file has them: recipes first, then the dense peers."""
    from selectune.errors import SelectuneError
    from selectune.files import read_json

    return read_json(FILE, error=SelectuneError)


def found() -> list[dict[str, Any]]:
    """The methods as the code has them."""
    from selectune.adapters import KINDS, make
    from selectune.recipes import RECIPES

    peers = [
        {
            "name": kind.name,
            "summary": kind.summary,
            "reads": "nothing",
            "passes": "none",
            "bytes": "16 a scalar of the module",
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
    return [*(row(name) for name in RECIPES), *peers]


def row(name: str) -> dict[str, Any]:
    """A method of the table of recipes, as the list has it."""
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
    """The text of the file as it should be."""
    return json.dumps(found(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
