"""Writes docs/methods.md from the recipes themselves: `python docs/gallery.py`.

Formulas are the first lines of the scores' docstrings, times of selection those of the schedules', parameters and their
defaults those of the signatures, and sources and costs the rows that `selectune methods` lists. A test asserts that
the page is what this script writes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import selectune as st
from selectune.quota import QUOTAS
from selectune.recipes import RECIPES, Recipe
from selectune.select import PerTensor
from selectune.structure import UNITS

PAGE = Path(__file__).with_name("methods.md")
DENSE = "none: whole tensors are trained"  # what stands in place of a formula
_FORMULA = re.compile(r"(?:\([^)]*\)|[^,(])*")  # up to the first comma that is not in brackets
SHORT = {
    "OneShot": "once",
    "Increment": "a share at every step",
    "Repeat": "afresh at every selection",
    "DropGrow": "drop and grow",
    "Rounds": "where dense steps end",
}
EVERY_STEP = "Every step is dense: nothing is selected."

HEAD = """\
<!-- Written by `python docs/gallery.py`; change the docstrings, not this page. -->

# Methods

Each method is a function of `selectune`, a *recipe*. `selectune methods NAME` prints the same facts on the command
line, and [How to choose](how-to-choose.md) compares them. In the formulas w is a weight and g its gradient; B is the
budget and T the number of optimizer steps of the run. The entries with the highest score are selected.

| recipe | formula | chosen | source |
|---|---|---|---|
"""

SHARED = """
Most recipes share four parameters. `budget` is a count of scalars (an int) or a density (a float below 1). `steps` is
the number of optimizer steps of the run. `scope` says which parameters may be selected, by patterns or as an
`st.Scope`. `train_fully` names parameters that are trained as a whole, outside the budget. Memory is in bytes, beside
the model, for float32 and AdamW.

On a base in 8 or 4 bits the offsets lie beside the weights, and what the lecture calls qID3, qPaFi and qSpIEL is `id3`,
`pafi` and `spiel_ag` or `spiel_ma` on such a base: [Train beside a quantised base](how-to/quantised.md).
"""


def made(recipe: Recipe) -> st.Method:
    """The method with small numbers for what a recipe insists on."""
    takes = inspect.signature(recipe.function).parameters
    needed: dict[str, Any] = {"steps": 100} if "steps" in takes else {}
    if "budget" in takes and takes["budget"].default is inspect.Parameter.empty:
        needed["budget"] = 1000
    return recipe.function(**needed)


def formula(method: st.Method) -> str:
    """The score's formula, with the parameters that this method sets differently."""
    if method.score is None:
        return DENSE
    maker = getattr(st.scores, method.score.name)
    line = re.split(r": |\. |\.$", _first(maker), maxsplit=1)[0]
    code = _FORMULA.match(line)[0]  # pyright: ignore[reportOptionalSubscript]  # it matches nothing, too
    usual, own = maker().parameters, method.score.parameters
    numbers = [f"{k}={v:g}" for k, v in own.items() if isinstance(v, float) and v != usual[k] and k in code]
    return f"<code>{code}</code>{line[len(code) :]}" + (f" with {', '.join(numbers)}" if numbers else "")


def when(method: st.Method) -> str:
    """The first line of the schedule's docstring, and how many steps lie between two selections."""
    if method.schedule is None:
        return EVERY_STEP
    every = getattr(method.schedule, "every", 1)
    return _first(type(method.schedule)) + (f" By default `every={every}`." if every != 1 else "")


def units(method: st.Method) -> str:
    """What is selected as one."""
    return "; ".join(UNITS[name] for name in dict.fromkeys(method.structure.all_units))


def briefly(method: st.Method) -> str:
    return "-" if method.schedule is None else SHORT[type(method.schedule).__name__]


def signature(recipe: Recipe) -> str:
    parameters = inspect.signature(recipe.function).parameters.values()
    given = [p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default!r}" for p in parameters]
    line = f"st.{recipe.function.__name__}({', '.join(given)})"
    if len(line) <= 100:
        return line
    return f"st.{recipe.function.__name__}(\n    " + ",\n    ".join(given) + ",\n)"


def explained(recipe: Recipe) -> str:
    """The docstring without its first line, source and example."""
    body = (inspect.getdoc(recipe.function) or "").partition("\n")[2]
    body = re.split(r"(?:^|(?<=\s))Source: |^>>> ", body, maxsplit=1, flags=re.MULTILINE)[0]
    pieces = re.split(r"(`[^`]*`)", body.strip())
    return "".join(p if n % 2 else re.sub(r"([*_<\[])", r"\\\1", p) for n, p in enumerate(pieces))


def source(recipe: Recipe) -> str:
    return re.sub(r"(?:arXiv )?\b(\d{4}\.\d{5})\b", r"[arXiv \1](https://arxiv.org/abs/\1)", recipe.source)


def section(recipe: Recipe) -> str:
    method = made(recipe)
    summary = recipe.summary[:1].upper() + recipe.summary[1:]
    rows = {
        "formula": _cell(formula(method)),
        "chosen": _cell(when(method)),
        **({} if method.structure.plain else {"one unit": units(method)}),
        **(
            {"division": "among tensors, " + _small(_first(QUOTAS[method.select.quota]))}
            if isinstance(method.select, PerTensor)
            else {}
        ),
        "reads": recipe.reads,
        "passes over the weights": recipe.passes,
        "memory": recipe.bytes,
        "source": source(recipe),
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    parts = [
        f"## {recipe.name}",
        re.sub(r"(?<![\w`])([*_<\[])", r"\\\1", summary),
        f"```text\n{signature(recipe)}\n```",
        f"| | |\n|---|---|\n{table}",
        explained(recipe),
        f"[Reference](reference/recipes.md#selectune.{recipe.function.__name__})",
    ]
    return "\n\n".join(part for part in parts if part)


def written() -> str:
    """The page as it should be."""
    recipes = RECIPES.values()
    rows = [
        f"| [{r.name}](#{r.name}) | {_cell(formula(made(r)))} | {briefly(made(r))} | {source(r)} |" for r in recipes
    ]
    return HEAD + "\n".join(rows) + "\n" + SHARED + "\n" + "\n\n".join(map(section, recipes)) + "\n"


def _small(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _first(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _cell(text: str) -> str:
    return text.replace("|", "&#124;")  # GitHub and Python-Markdown do not agree on an escaped bar within code


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
    print(f"wrote {PAGE.name}: {len(RECIPES)} methods")
