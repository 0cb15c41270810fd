"""Scores, sorted by what they read. A new one is one function, in this room or anywhere (docs/extend.md).

weight    the weight alone: |w|, -|w|, |W_r| of a low rank, chance
gradient  the step's gradient: ID3's |g| / (|w| + eps)^exp
data      data at fixed weights: Fisher, SNIP, SPEFT, GraSP, SynFlow, movement, sensitivity
change    the change that a dense phase made
factors   an optimizer's numbers for rows and columns
"""

from selectune.scores.change import change
from selectune.scores.data import d3_pooled, fisher, fisher_batches, grasp, movement, sensitivity, snip, synflow
from selectune.scores.factors import row_times_column
from selectune.scores.gradient import d3
from selectune.scores.weight import constant, lift, magnitude, pafi, random

__all__ = [
    "change", "constant", "d3", "d3_pooled", "fisher", "fisher_batches", "grasp", "lift", "magnitude", "movement",
    "pafi", "random", "row_times_column", "sensitivity", "snip", "synflow",
]  # fmt: skip
