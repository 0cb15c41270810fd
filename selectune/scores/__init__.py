"""Scores by what they read. A new one is one function here or anywhere (docs/extend.md)."""

from selectune.scores.gradient import d3, fisher
from selectune.scores.weight import constant, magnitude, pafi, random

__all__ = ["constant", "d3", "fisher", "magnitude", "pafi", "random"]
