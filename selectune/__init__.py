"""selectune: train the few scalars of a model that are worth training, in place, and ship them as a delta.

Importing the package loads nothing: a public name is fetched when it is first used, and torch with it, so that
`selectune --help` answers at once. A new name is a line in the imports below and its place in `__all__`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for readers, pyright and IDEs; `__getattr__` finds the same things in the same places
    from selectune import errors, scores
    from selectune.delta import Delta, Shelf, diff, load, switch
    from selectune.delta.combine import algebra
    from selectune.interop import sync
    from selectune.method import Method
    from selectune.models.load import load_model
    from selectune.recipes import (
        bitfit,
        child_tuning_d,
        child_tuning_f,
        diff_pruning,
        fish,
        fish_dip,
        full,
        gallop,
        gem,
        grasp,
        id3,
        increment_pafi,
        increment_random,
        lift,
        losia,
        lt_sft,
        magnitude,
        movement,
        paca,
        pafi,
        random,
        repeat_d3,
        repeat_random,
        rigl,
        rosa,
        s2ft,
        smt,
        snip,
        sparse_adapter,
        sparse_evolution,
        speft,
        spiel_ag,
        spiel_ma,
        static_d3,
        synflow,
        xattn,
    )
    from selectune.scope import Scope
    from selectune.train import SparseAdamW, SparseSM3, Tuner, Verification, attach, strip, tuner_of
    from selectune.types import Score, score

__version__ = "0.1.0"

__all__ = [
    "Delta", "Method", "Scope", "Score", "Shelf", "SparseAdamW", "SparseSM3", "Tuner", "Verification", "algebra",
    "attach", "bitfit", "child_tuning_d", "child_tuning_f", "diff", "diff_pruning", "errors", "fish", "fish_dip",
    "full", "gallop", "gem", "grasp", "id3", "increment_pafi", "increment_random", "lift", "load", "load_model",
    "losia", "lt_sft", "magnitude", "movement", "paca", "pafi", "random", "repeat_d3", "repeat_random", "rigl",
    "rosa", "s2ft", "score", "scores", "smt", "snip", "sparse_adapter", "sparse_evolution", "speft", "spiel_ag",
    "spiel_ma", "static_d3", "strip", "switch", "sync", "synflow", "tuner_of", "xattn",
]  # fmt: skip

_HOMES = ("delta", "method", "recipes", "scope", "train", "types")  # where public names are looked for, in this order
_ABOVE = {"load_model": "models.load", "sync": "interop"}  # what is made of the core, and lives above it
_MODULES = (
    *_HOMES,
    "errors",
    "ops",
    "phases",
    "schedule",
    "scores",
    "select",
    "structure",
)  # what `import selectune` gives too


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"selectune.{name}")
    if name in _ABOVE:
        globals()[name] = getattr(import_module(f"selectune.{_ABOVE[name]}"), name)
        return globals()[name]
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"selectune.{home}")
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module 'selectune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
