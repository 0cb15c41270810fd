"""A recipe with options as text: `id3:exp=1,every=10`. Its signature says which options it takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selectune import spec
from selectune.errors import BudgetError, ConfigError, did_you_mean
from selectune.method import Method
from selectune.recipes import RECIPES, Recipe

APART = ("budget", "steps", "scope", "train_fully")
"""Parameters of every run, which are not options of a recipe."""


@dataclass(frozen=True)
class Named:
    """A recipe with the given options."""

    recipe: Recipe
    options: Mapping[str, spec.Value]

    @property
    def name(self) -> str:
        return self.recipe.name

    def __str__(self) -> str:
        """The canonical text: options in the signature's order, without those at their default."""
        known = parameters(self.recipe)
        given = {name: self.options[name] for name in known if name in self.options}
        return spec.join(self.name, {n: v for n, v in given.items() if v != known[n].default})

    def make(self, budget: int | float | None, steps: int, **more: Any) -> Method:
        """The method, for a run of that many steps; `more`: scope, train_fully, and defaults of options."""
        takes = inspect.signature(self.recipe.function).parameters
        if budget is not None and "budget" not in takes:
            raise ConfigError(f"The method '{self.name}' takes no budget, but budget={budget!r} was given.")
        if budget is None and "budget" in takes and takes["budget"].default is inspect.Parameter.empty:
            raise BudgetError(
                f"The method '{self.name}' needs a budget: how many scalars may change, such as 103000, or 0.0017 of "
                "the model (command line: --budget 103k, --budget 0.17%)."
            )
        given: dict[str, Any] = {} if budget is None else {"budget": budget}
        if "steps" in takes:
            given["steps"] = steps
        return self.recipe.function(**{**given, **more, **self.options})


def named(text: str, also: Sequence[str] = ()) -> Named:
    """Reads the text of a recipe. Raises ConfigError with the known names (and `also`), or the known options.

    >>> str(named("id3:every=10,exp=2"))
    'id3:every=10'
    """
    name, given = spec.split(text)
    if name not in RECIPES:
        raise ConfigError(f"Unknown method '{name}'. Known: {', '.join([*RECIPES, *also])}.{_meant(name, also)}")
    recipe = RECIPES[name]
    known = parameters(recipe)
    for option in given:
        if option in APART:
            flag = {"steps": "max-steps", "scope": "include", "train_fully": "train-fully"}.get(option, option)
            raise ConfigError(f"'{text}': {option} is no option of a method; it is given by itself, as --{flag}.")
        if option not in known:
            raise ConfigError(
                f"The method '{name}' takes no option {option}. It takes: {', '.join(known) or 'none'}."
                f"{did_you_mean(option, known)}"
            )
    return Named(recipe, {option: _value(name, known[option], value) for option, value in given.items()})


def parameters(recipe: Recipe) -> dict[str, inspect.Parameter]:
    """The options of a recipe, by name."""
    return {n: p for n, p in inspect.signature(recipe.function).parameters.items() if n not in APART}


def _value(name: str, parameter: inspect.Parameter, value: spec.Value) -> spec.Value:
    """The value in the type of the signature."""
    kinds = _kinds(parameter)
    if type(value) is int and "int" not in kinds and "float" in kinds:
        return float(value)
    if ("None" if value is None else type(value).__name__) not in kinds:
        words = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a word", "None": "none"}
        allowed = " or ".join(words.get(kind, kind) for kind in kinds if (kind, "float" in kinds) != ("int", True))
        raise ConfigError(f"The method '{name}': {parameter.name}={value!r} is not allowed; it must be {allowed}.")
    return value


def _kinds(parameter: inspect.Parameter) -> list[str]:
    """The names of the types that an option takes: those of its annotation, else the one of its default."""
    annotation = type(parameter.default) if parameter.annotation is parameter.empty else parameter.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return [kind.strip().replace("NoneType", "None") for kind in text.split("|")]


def _meant(name: str, also: Sequence[str]) -> str:
    """A guess at the name that was meant, which may also be the name of the Python function."""
    names = {recipe.function.__name__.replace("_", "-"): known for known, recipe in RECIPES.items()}
    names |= {known: known for known in (*RECIPES, *also)}
    guess = did_you_mean(name.lower().replace("_", "-"), names)
    meant = guess.removeprefix(" Did you mean ").removesuffix("?")
    return f" Did you mean {names[meant]}?" if guess else ""
