"""selectune: train the few scalars of a model that are worth training, in place, and ship them as a delta."""

from selectune import errors, scores
from selectune.delta import Delta, Shelf, algebra, diff, load, switch
from selectune.method import Method
from selectune.recipes import (
    bitfit,
    child_tuning_d,
    child_tuning_f,
    diff_pruning,
    fish,
    fish_dip,
    full,
    gallop,
    grasp,
    id3,
    increment_pafi,
    lt_sft,
    magnitude,
    movement,
    pafi,
    random,
    repeat_d3,
    rigl,
    snip,
    sparse_adapter,
    sparse_evolution,
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
    "full", "gallop", "grasp", "id3", "increment_pafi", "load", "lt_sft", "magnitude", "movement", "pafi", "random",
    "repeat_d3", "rigl", "score", "scores", "snip", "sparse_adapter", "sparse_evolution", "spiel_ag", "spiel_ma",
    "static_d3", "strip", "switch", "synflow", "tuner_of", "xattn",
]  # fmt: skip
