"""selectune: train the few scalars of a model that are worth training, in place, and ship them as a delta."""

from selectune import errors, scores
from selectune.delta import Delta, diff, load
from selectune.method import Method
from selectune.recipes import (
    bitfit,
    fish,
    full,
    id3,
    increment_pafi,
    pafi,
    random,
    repeat_d3,
    static_d3,
)
from selectune.scope import Scope
from selectune.train import SparseAdamW, Tuner, Verification, attach
from selectune.types import Score, score

__version__ = "0.1.0"

__all__ = [
    "Delta", "Method", "Scope", "Score", "SparseAdamW", "Tuner", "Verification", "attach", "bitfit", "diff", "errors",
    "fish", "full", "id3", "increment_pafi", "load", "pafi", "random", "repeat_d3", "score", "scores", "static_d3",
]  # fmt: skip
