"""A method is a value composed of four axes; a recipe is a named composition.

>>> import selectune as st
>>> st.id3(budget=1000, steps=50).schedule
Increment(budget=1000, steps=50, every=1, spread='cumulative')
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from selectune import scores
from selectune.errors import ConfigError
from selectune.schedule import Budget, Increment, OneShot, Repeat
from selectune.scope import BIASES, Scope, patterns
from selectune.select import GlobalTopK
from selectune.types import Reads, Schedule, Score, Select

Patterns = str | Sequence[str]


@dataclass(frozen=True)
class Method:
    """scope x score x select x schedule.

    Without a score nothing is selected and the scope must train something wholly (`full`). A score
    that reads examples takes them through `attach(..., calibration=batches, loss=callable)`.

    >>> import selectune as st
    >>> from selectune.schedule import Increment
    >>> st.Method(scope=st.Scope(exclude="*.bias"), score=st.scores.magnitude(), schedule=Increment(10, 5)).name
    'custom'
    """

    scope: Scope = Scope()
    score: Score | None = None
    select: Select = GlobalTopK()
    schedule: Schedule | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        if not isinstance(self.scope, Scope):
            raise ConfigError(f"scope must be a selectune.Scope, got {type(self.scope).__name__}.")
        if self.score is not None and not isinstance(self.score, Score):
            raise ConfigError(
                f"score must be a selectune.Score, got {type(self.score).__name__}. "
                "A plain function becomes one through @selectune.score(reads=...), called once."
            )
        if (self.score is None) != (self.schedule is None):
            raise ConfigError("A score and a schedule come together: give both, or neither to train only train_fully.")
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise ConfigError(f"schedule must follow selectune.types.Schedule, got {type(self.schedule).__name__}.")
        if not isinstance(self.select, Select):
            raise ConfigError(f"select must follow selectune.types.Select, got {type(self.select).__name__}.")
        if self.score is None and not self.scope.train_fully:
            raise ConfigError("A method without a score trains nothing unless its scope has train_fully patterns.")

    def describe(self) -> dict[str, Any]:
        """The method as plain JSON values, as recorded in a delta."""
        return {
            "name": self.name,
            "scope": {f.name: list(getattr(self.scope, f.name)) for f in dataclasses.fields(Scope)},
            "score": None if self.score is None else {"name": self.score.name, **_plain(self.score.parameters)},
            "select": {"name": type(self.select).__name__, **_fields(self.select)},
            "schedule": None if self.schedule is None else {
                "name": type(self.schedule).__name__, **_fields(self.schedule)
            },
        }  # fmt: skip


def id3(
    budget: Budget,
    steps: int | None = None,
    exp: float = 2.0,
    eps: float = 1.0,
    every: int = 1,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
    spread: str = "cumulative",
) -> Method:
    """ID3: at every step unmask the B/T entries with the largest |g| / (|w| + eps)^exp.

    `steps` is the number of optimizer steps of the run, T. `every=k` selects k quotas at every k-th
    step; the steps between cost no dense gradient. Reads the gradient of the selecting steps.
    Source: Agarwal, Ramesh, Sengupta, Chakraborty (2025), Step-by-Step Unmasking, arXiv 2408.14470.

    >>> import selectune as st
    >>> st.id3(budget=0.001, steps=500, exp=1.0).score.parameters
    {'exp': 1.0, 'eps': 1.0}
    """
    return _compose("id3", _d3(exp, eps), Increment(budget, steps, every, spread), scope, train_fully)


def repeat_d3(
    budget: Budget,
    steps: int | None = None,
    exp: float = 2.0,
    eps: float = 1.0,
    every: int = 1,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """repeat-D3: at every step train the B entries with the largest D3 score, chosen afresh.

    More than B entries differ from the base in the end, up to all: `tuner.touched` counts them and the
    delta stores them. Dropped entries keep their value and lose their optimizer state.
    Source: Agarwal et al. (2025), repeat-S, arXiv 2408.14470.

    >>> import selectune as st
    >>> st.repeat_d3(budget=1000, steps=50).schedule.keeps
    False
    """
    return _compose("repeat-d3", _d3(exp, eps), Repeat(budget, steps, every), scope, train_fully)


def static_d3(
    budget: Budget,
    exp: float = 2.0,
    eps: float = 1.0,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """static-D3: all B entries by the D3 score of the first step's gradient, then fixed.

    Source: Agarwal et al. (2025), static ablation, arXiv 2408.14470; the same score chosen once is
    GaLLoP (2025), arXiv 2510.19778.

    >>> import selectune as st
    >>> st.static_d3(budget=1000).schedule
    OneShot(budget=1000)
    """
    return _compose("static-d3", _d3(exp, eps), OneShot(budget), scope, train_fully)


def increment_pafi(
    budget: Budget,
    steps: int | None = None,
    every: int = 1,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """Incremental PaFi: at every step unmask the B/T smallest |w|. Needs no dense gradient at all.

    Source: Agarwal et al. (2025), ablation of the schedule, arXiv 2408.14470.

    >>> import selectune as st
    >>> st.increment_pafi(budget=1000, steps=50).score.name
    'pafi'
    """
    return _compose("increment-pafi", scores.pafi(), Increment(budget, steps, every), scope, train_fully)


def pafi(budget: Budget, scope: Scope | Patterns = ("*",), train_fully: Patterns = (), tie: str = "order") -> Method:
    """PaFi: the B smallest |w| of the whole model, once. Reads the weights, no data.

    Source: Liao, Meng, Monz (2023), Parameter-Efficient Fine-Tuning without Introducing New Latency,
    arXiv 2305.16742.

    >>> import selectune as st
    >>> st.pafi(budget=0.005).schedule
    OneShot(budget=0.005)
    """
    return _compose("pafi", scores.pafi(), OneShot(budget), scope, train_fully, GlobalTopK(tie))


def fish(
    budget: Budget,
    examples: int = 1024,
    labels: str = "data",
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """FISH mask: the B entries with the largest Fisher information over single examples, once.

    labels="data": the loss's own labels, one backward pass an example (empirical Fisher).
    labels="model": every class weighted by its probability, one backward pass a class (true Fisher).
    Source: Sung, Nair, Raffel (2021), Training Neural Networks with Fixed Sparse Masks, arXiv 2111.09839.

    >>> import selectune as st
    >>> st.fish(budget=1000, examples=64).score.parameters
    {'examples': 64, 'labels': 'data'}
    """
    if labels not in ("data", "model"):
        raise ConfigError(f"Unknown labels '{labels}'. Known: data, model.")
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ConfigError(f"examples= must be an int of at least 1, got {examples!r}.")
    score = scores.fisher(examples=examples, labels=labels)
    return _compose("fish", score, OneShot(budget), scope, train_fully)


def bitfit(train_fully: Patterns = (), scope: Scope | Patterns = (BIASES,)) -> Method:
    """BitFit: every bias vector; the budget is what they come to.

    A bias is a tensor whose last name component is `bias` or ends in `_bias`.
    Source: Ben Zaken, Goldberg, Ravfogel (2022), BitFit, arXiv 2106.10199.

    >>> import torch, selectune as st
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    >>> st.attach(model, st.bitfit()).selected
    6
    """
    return _compose("bitfit", scores.constant(), OneShot(None), scope, train_fully)


def random(budget: Budget, scope: Scope | Patterns = ("*",), train_fully: Patterns = ()) -> Method:
    """Random mask: B entries uniformly over the scope, once; the seed is `attach`'s.

    The baseline that every other selection has to beat (R-Mask).

    >>> import selectune as st
    >>> st.random(budget=1000).score.name
    'random'
    """
    return _compose("random", scores.random(), OneShot(budget), scope, train_fully)


def full(scope: Patterns = ("*",)) -> Method:
    """Full fine-tuning through the same door: every weight, dense gradients, dense optimizer state.

    >>> import selectune as st
    >>> st.full().scope.train_fully
    ('*',)
    """
    return Method(Scope(include=(), train_fully=scope), name="full")


@dataclass(frozen=True)
class Recipe:
    """A recipe as `selectune methods` lists it."""

    name: str
    function: Callable[..., Method]
    reads: str  # what selection reads, and how often
    source: str

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or "").partition("\n")[0].partition(": ")[2]


_ID3 = "Agarwal et al. 2025, arXiv 2408.14470"
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("id3", id3, "the gradient of every selecting step", _ID3),
        Recipe("repeat-d3", repeat_d3, "the gradient of every selecting step", _ID3),
        Recipe("static-d3", static_d3, "the gradient of the first step", f"{_ID3}; GaLLoP 2025, arXiv 2510.19778"),
        Recipe("increment-pafi", increment_pafi, "the weights, once", _ID3),
        Recipe("pafi", pafi, "the weights, once", "Liao, Meng, Monz 2023, arXiv 2305.16742"),
        Recipe(
            "fish",
            fish,
            "single-example gradients, before training",
            "Sung, Nair, Raffel 2021, arXiv 2111.09839",
        ),
        Recipe("bitfit", bitfit, "names", "Ben Zaken, Goldberg, Ravfogel 2022, arXiv 2106.10199"),
        Recipe("random", random, "nothing", "R-Mask baseline of arXiv 2111.09839 and 2408.14470"),
        Recipe("full", full, "nothing", "the dense baseline"),
    )
}


def _compose(
    name: str,
    score: Score,
    schedule: Schedule,
    scope: Scope | Patterns,
    train_fully: Patterns,
    select: Select | None = None,
) -> Method:
    if isinstance(scope, Scope):
        if patterns(train_fully):
            scope = dataclasses.replace(scope, train_fully=(*scope.train_fully, *patterns(train_fully)))
    else:
        scope = Scope(include=scope, train_fully=train_fully)
    return Method(scope, score, select or GlobalTopK(), schedule, name)


def _d3(exp: float, eps: float) -> Score:
    for name, value in (("exp", exp), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{name}={value!r}: a finite number is needed.")
    if eps <= 0:
        raise ConfigError(f"eps={eps}: must be above 0, or a weight of 0 divides by 0.")
    if not 1e-30 < float(eps) ** abs(float(exp)) < 1e30:
        raise ConfigError(f"eps={eps} to the power exp={exp} leaves the range of float32 scores (1e-30 to 1e30).")
    return scores.d3(exp=float(exp), eps=float(eps))


def _plain(parameters: Any) -> dict[str, Any]:
    return {k: v if isinstance(v, str | int | float | bool | None) else repr(v) for k, v in parameters.items()}


def _fields(value: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value):
        return {}
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


__all__ = [
    "RECIPES", "Method", "Reads", "Recipe", "bitfit", "fish", "full", "id3", "increment_pafi", "pafi", "random",
    "repeat_d3", "static_d3",
]  # fmt: skip
