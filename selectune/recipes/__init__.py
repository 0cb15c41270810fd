"""Recipes: named methods, sorted by when they select. A new one is a function and a row here.

increment   more entries at every step: ID3
repeat      all entries again, every few steps
static      once, from the weights or the first gradient
calibrated  once, from data at fixed weights
drop_grow   drop and grow: RigL, SET, SpIEL
phased      when a dense phase ends: LT-SFT, diff pruning
structured  whole rows, columns, blocks, heads, subnets: S2FT, SMT, PaCA, LoSiA
whole       whole tensors: full fine-tuning and relatives
named       recipes by name, with options: `id3:exp=1,every=10`
parameters  checks that recipes share
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from selectune.method import Method
from selectune.recipes.calibrated import (
    child_tuning_d,
    fish,
    gem,
    grasp,
    movement,
    rosa,
    snip,
    sparse_adapter,
    speft,
    synflow,
)
from selectune.recipes.drop_grow import rigl, sparse_evolution, spiel_ag, spiel_ma
from selectune.recipes.increment import id3, increment_pafi, increment_random
from selectune.recipes.phased import diff_pruning, lt_sft
from selectune.recipes.repeat import fish_dip, lift, repeat_d3, repeat_random
from selectune.recipes.static import bitfit, gallop, magnitude, pafi, random, static_d3
from selectune.recipes.structured import losia, paca, s2ft, smt
from selectune.recipes.whole import child_tuning_f, full, xattn


@dataclass(frozen=True)
class Recipe:
    """A recipe as `selectune methods` lists it."""

    name: str
    function: Callable[..., Method]
    reads: str  # what selection reads, and how often
    source: str
    passes: str  # cost of choosing: passes over the weights beyond those of frozen training
    bytes: str  # memory beside the model, fp32 with AdamW
    optimizer: str = "adamw"  # what a run from the command line trains with (selectune.runs.trainer)
    beside: bool = False  # it trains the base beside an adapter, which is not frozen then

    @property
    def summary(self) -> str:
        first = (self.function.__doc__ or "").partition("\n")[0]
        return first.partition(": ")[2] or first


_ID3 = "Agarwal et al. 2025, arXiv 2408.14470"
_CONTROL = "R-Mask baseline in the steps of arXiv 2408.14470"
_GALLOP = "Choudhary et al. 2025, arXiv 2510.19778"
_PAFI = "Liao, Meng, Monz 2023, arXiv 2305.16742"
_GEM = "Kang et al. 2025, arXiv 2508.16191"
_FISH = "Sung, Nair, Raffel 2021, arXiv 2111.09839"
_BITFIT = "Ben Zaken, Goldberg, Ravfogel 2022, arXiv 2106.10199"
_LIFT = "Liu et al. 2025, arXiv 2506.00772"
_SNIP = "Lee, Ajanthan, Torr 2019, arXiv 1810.02340"
_SPEFT = "Liu et al. 2024, arXiv 2412.13488"
_GRASP = "Wang, Zhang, Grosse 2020, arXiv 2002.07376"
_SYNFLOW = "Tanaka et al. 2020, arXiv 2006.05467"
_MOVEMENT = "Sanh, Wolf, Rush 2020, arXiv 2005.07683"
_MAGNITUDE = "Han et al. 2015, arXiv 1506.02626"
_CHILD = "Xu et al. 2021, arXiv 2109.05687"
_ADAPTER = "He et al. 2022, arXiv 2210.04284"
_XATTN = "Gheini, Ren, May 2021, arXiv 2104.08771"
_DIP = "Das et al. 2023, arXiv 2311.03748"
_HARDEST = "losses of all examples and gradients of the hardest, every 100 steps"
_BEFORE = "mini-batch gradients, before training"
_LT_SFT = "Ansell et al. 2022, arXiv 2110.07560"
_DIFF = "Guo, Rush, Kim 2021, arXiv 2012.07463"
_CHANGE = "the change by dense training, once per round"
_S2FT = "Yang et al. 2024, arXiv 2412.06289"
_SMT = "He et al. 2024, arXiv 2405.15525"
_PACA = "Woo et al. 2025, arXiv 2503.01905"
_LOSIA = "Wang et al. 2025, arXiv 2507.04487"
_ROSA = "Nikdan et al. 2024, arXiv 2401.04679"
_SPIEL = "Ansell et al. 2024, arXiv 2401.16405"
_RIGL = "Evci et al. 2020, arXiv 1911.11134"
_SET = "Mocanu et al. 2018, arXiv 1707.04780"
_EVERY = "the gradient of every selecting step"
_DENSE_STEP = "a dense gradient and one pass, each selecting step"
_LATER = "{} per weight in dense steps, then about 40 per selected scalar"
_SPARSE = "about 40 per selected scalar"
_ONCE = f"{_SPARSE}; 4 per weight, once"
_DOUBLE = f"{_SPARSE}; 12 per weight and the graph of a double backward pass, once"
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("id3", id3, _EVERY, _ID3, _DENSE_STEP, _SPARSE),
        Recipe("repeat-d3", repeat_d3, _EVERY, _ID3, _DENSE_STEP, _SPARSE),
        Recipe("static-d3", static_d3, "the gradient of the first step", f"{_ID3}; {_GALLOP}", "one", _SPARSE),
        Recipe("increment-pafi", increment_pafi, "the weights, once", _ID3, "one", _SPARSE),
        Recipe("increment-random", increment_random, "nothing", _CONTROL, "one", _SPARSE),
        Recipe(
            "repeat-random",
            repeat_random,
            "nothing",
            _CONTROL,
            "one, each selection",
            _SPARSE,
        ),
        Recipe("pafi", pafi, "the weights, once", _PAFI, "one", _SPARSE),
        Recipe("fish", fish, "single-example gradients, before training", _FISH, "one per example", _ONCE),
        Recipe(
            "fish-dip",
            fish_dip,
            _HARDEST,
            _DIP,
            "one per example, each selecting step",
            f"{_SPARSE}; 4 per weight, each selection",
        ),
        Recipe("lift", lift, "the weights, every 200 steps", _LIFT, "a decomposition of each matrix", _SPARSE),
        Recipe("child-tuning-d", child_tuning_d, _BEFORE, _CHILD, "one per mini-batch", _ONCE),
        Recipe("movement", movement, _BEFORE, _MOVEMENT, "one per mini-batch", _ONCE),
        Recipe("magnitude", magnitude, "the weights, once", _MAGNITUDE, "one", _SPARSE),
        Recipe("snip", snip, _BEFORE, _SNIP, "one per mini-batch", _ONCE),
        Recipe("speft", speft, _BEFORE, _SPEFT, "one per mini-batch", _ONCE),
        Recipe("gem", gem, _BEFORE, _GEM, "one per mini-batch, and one", _ONCE),
        Recipe("rosa", rosa, _BEFORE, _ROSA, "one per mini-batch", f"{_ONCE}; LoRA's", beside=True),
        Recipe("grasp", grasp, "Hessian-gradient products, before training", _GRASP, "three per mini-batch", _DOUBLE),
        Recipe(
            "synflow", synflow, "the flow of ones, before training", _SYNFLOW, "one", f"{_SPARSE}; 5 per weight, once"
        ),
        Recipe(
            "sparse-adapter",
            sparse_adapter,
            _BEFORE,
            _ADAPTER,
            "one per mini-batch",
            f"{_SPARSE}; 8 per weight in scope",
        ),
        Recipe("gallop", gallop, "the gradient of the first step", _GALLOP, "one", _SPARSE),
        Recipe(
            "spiel-ag",
            spiel_ag,
            "gradients: of a window's first pass, then of candidates",
            _SPIEL,
            "a dense gradient and one pass, each window",
            f"{_SPARSE}; 40 per candidate in a window",
            "adamw-entry",
        ),
        Recipe(
            "spiel-ma",
            spiel_ma,
            "SM3's accumulators",
            _SPIEL,
            "one, each selecting step",
            "about 50 per selected scalar, 4 per row and column",
            "sm3",
        ),
        Recipe("rigl", rigl, _EVERY, _RIGL, _DENSE_STEP, _SPARSE, "adamw-entry"),
        Recipe("set", sparse_evolution, "nothing", _SET, "one, each selecting step", _SPARSE, "adamw-entry"),
        Recipe("s2ft", s2ft, "names; chance", _S2FT, "none", _SPARSE),
        Recipe("smt", smt, _BEFORE, _SMT, "one per mini-batch", _ONCE),
        Recipe("paca", paca, "nothing", _PACA, "none", _SPARSE),
        Recipe("losia", losia, _BEFORE, _LOSIA, "one per mini-batch", _ONCE),
        Recipe("bitfit", bitfit, "names", _BITFIT, "none", _SPARSE),
        Recipe("random", random, "nothing", "R-Mask baseline of arXiv 2111.09839 and 2408.14470", "one", _SPARSE),
        Recipe("xattn", xattn, "names", _XATTN, "none", "16 per weight of the blocks"),
        Recipe("lt-sft", lt_sft, _CHANGE, _LT_SFT, "dense steps, and one", _LATER.format(20)),
        Recipe(
            "diff-pruning",
            diff_pruning,
            _CHANGE,
            _DIFF,
            "dense steps, and one",
            _LATER.format(36),
        ),
        Recipe("child-tuning-f", child_tuning_f, "nothing", _CHILD, "dense steps", "20 per weight"),
        Recipe("full", full, "nothing", "the dense baseline", "none", "16 per weight"),
    )
}

__all__ = [
    "RECIPES", "Recipe", "bitfit", "child_tuning_d", "child_tuning_f", "diff_pruning", "fish", "fish_dip", "full",
    "gallop", "gem", "grasp", "id3", "increment_pafi", "increment_random", "losia", "lt_sft", "magnitude", "movement",
    "paca", "pafi", "random", "repeat_d3", "repeat_random", "rigl", "rosa", "s2ft", "smt", "snip", "sparse_adapter",
    "sparse_evolution", "spiel_ag", "spiel_ma", "static_d3", "synflow", "xattn",
]  # fmt: skip
