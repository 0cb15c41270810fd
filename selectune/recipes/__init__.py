"""Recipes: named methods, sorted by when they choose the support. A new one is a function and a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from selectune.method import Method
from selectune.recipes.dense import full
from selectune.recipes.increment import id3, increment_pafi
from selectune.recipes.repeat import repeat_d3
from selectune.recipes.static import bitfit, fish, pafi, random, static_d3


@dataclass(frozen=True)
class Recipe:
    """A recipe as `selectune methods` lists it."""

    name: str
    function: Callable[..., Method]
    reads: str  # what selection reads, and how often
    source: str
    passes: str  # cost of choosing: passes over the weights beyond those of frozen training
    bytes: str  # memory beside the model, fp32 with AdamW

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or "").partition("\n")[0].partition(": ")[2]


_ID3 = "Agarwal et al. 2025, arXiv 2408.14470"
_GALLOP = "GaLLoP 2025, arXiv 2510.19778"
_PAFI = "Liao, Meng, Monz 2023, arXiv 2305.16742"
_FISH = "Sung, Nair, Raffel 2021, arXiv 2111.09839"
_BITFIT = "Ben Zaken, Goldberg, Ravfogel 2022, arXiv 2106.10199"
_EVERY = "the gradient of every selecting step"
_DENSE_STEP = "a dense gradient and one pass, a selecting step"
_SPARSE = "about 40 a selected scalar"
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("id3", id3, _EVERY, _ID3, _DENSE_STEP, _SPARSE),
        Recipe("repeat-d3", repeat_d3, _EVERY, _ID3, _DENSE_STEP, _SPARSE),
        Recipe("static-d3", static_d3, "the gradient of the first step", f"{_ID3}; {_GALLOP}", "one", _SPARSE),
        Recipe("increment-pafi", increment_pafi, "the weights, once", _ID3, "one", _SPARSE),
        Recipe("pafi", pafi, "the weights, once", _PAFI, "one", _SPARSE),
        Recipe("fish", fish, "single-example gradients, before training", _FISH, "one an example", "4 a weight, once"),
        Recipe("bitfit", bitfit, "names", _BITFIT, "none", _SPARSE),
        Recipe("random", random, "nothing", "R-Mask baseline of arXiv 2111.09839 and 2408.14470", "one", _SPARSE),
        Recipe("full", full, "nothing", "the dense baseline", "none", "16 a weight"),
    )
}

__all__ = [
    "RECIPES", "Recipe", "bitfit", "fish", "full", "id3", "increment_pafi", "pafi", "random", "repeat_d3", "static_d3",
]  # fmt: skip
