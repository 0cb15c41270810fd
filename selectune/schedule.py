"""Schedules: step -> is it time to select, and how many entries are selected by then.

Every schedule here is a frozen value with the same five members (`selectune.types.Schedule`).
Steps are optimizer steps, numbered from 0; a step skipped by a gradient scaler is not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from selectune.errors import BudgetError, ScheduleError

Budget = int | float | None


def resolve_budget(budget: Budget, eligible: int) -> int:
    """Turns a count or a density into a count of scalars.

    An int is a count. A float below 1 is a density and is rounded to the nearest count. None means everything.

    >>> resolve_budget(0.25, 1000), resolve_budget(12, 1000), resolve_budget(None, 1000)
    (250, 12, 1000)
    """
    if budget is None:
        return eligible
    count = round(budget * eligible) if isinstance(budget, float) else budget
    if count < 1:
        raise BudgetError(
            f"The budget {budget} comes to {count} of {eligible:,} scalars in scope; it must come to at least 1."
        )
    if count > eligible:
        raise BudgetError(
            f"The budget {count:,} is larger than the {eligible:,} scalars in scope that can be selected. "
            "Lower it, or widen the scope."
        )
    return count


def check_budget(budget: Budget) -> None:
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise BudgetError(
            f"budget must be a count (an int) or a density (a float below 1), got {budget!r} "
            f"of type {type(budget).__name__}."
        )
    if isinstance(budget, float) and not 0.0 < budget < 1.0:
        raise BudgetError(
            f"budget={budget} is a float, so it is a density and must lie between 0 and 1. For a count pass an int."
        )
    if isinstance(budget, int) and budget < 1:
        raise BudgetError(f"budget={budget}: at least 1 scalar must be trained.")


def check_count(name: str, value: int | None, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ScheduleError(f"{name}= is {what}: an int of at least 1 is needed, got {value!r}.")


@dataclass(frozen=True)
class OneShot:
    """All B entries are selected at step 0 and stay (static masks)."""

    budget: Budget

    def __post_init__(self) -> None:
        check_budget(self.budget)

    keeps = True
    steps = None

    def resolve(self, eligible: int) -> OneShot:
        return OneShot(resolve_budget(self.budget, eligible))

    def due(self, step: int) -> bool:
        del step
        return True

    def target(self, step: int) -> int:
        del step
        return _count(self.budget)


@dataclass(frozen=True)
class Increment:
    """A share of the budget at every step: floor((t+1) B / T) entries are selected by the end of step t.

    `every=k` selects the quotas of k steps at every k-th step, so the other steps need no dense gradient.
    If T does not divide B, `spread` says where the remainder goes: "cumulative" spreads it over all steps,
    "front" gives one more entry to each of the first B mod T steps.
    Source: Agarwal et al. (2025), ID3, increment-S (schedule {u_t}, sum B).

    >>> from selectune.schedule import Increment
    >>> [Increment(10, 4).target(t) for t in range(6)]
    [2, 5, 7, 10, 10, 10]
    >>> [Increment(10, 4, spread="front").target(t) for t in range(4)]
    [3, 6, 8, 10]
    """

    budget: Budget
    steps: int | None
    every: int = 1
    spread: str = "cumulative"

    keeps = True

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("steps", self.steps, "the number of optimizer steps over which the budget is unmasked")
        check_count("every", self.every, "how many steps lie between two selections")
        if self.spread not in ("cumulative", "front"):
            raise ScheduleError(f"Unknown spread '{self.spread}'. Known: cumulative, front.")

    def resolve(self, eligible: int) -> Increment:
        return dataclasses.replace(self, budget=resolve_budget(self.budget, eligible))

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def target(self, step: int) -> int:
        budget, steps = _count(self.budget), _count(self.steps)
        reached = min(steps, (step // self.every + 1) * self.every)
        if self.spread == "front":
            return reached * (budget // steps) + min(reached, budget % steps)
        return reached * budget // steps


@dataclass(frozen=True)
class Quotas:
    """A sequence u_0, u_1, ... of quotas; nothing is selected after its end.

    >>> from selectune.schedule import Quotas
    >>> [Quotas((3, 0, 2)).target(t) for t in range(4)]
    [3, 3, 5, 5]
    """

    quotas: Sequence[int]

    keeps = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "quotas", tuple(self.quotas))
        if not self.quotas or any(isinstance(u, bool) or not isinstance(u, int) or u < 0 for u in self.quotas):
            raise ScheduleError(f"quotas must be ints of at least 0, one for each step, got {self.quotas!r}.")
        check_budget(sum(self.quotas))

    @property
    def budget(self) -> int:
        return sum(self.quotas)

    @property
    def steps(self) -> int:
        return len(self.quotas)

    def resolve(self, eligible: int) -> Quotas:
        resolve_budget(self.budget, eligible)
        return self

    def due(self, step: int) -> bool:
        del step
        return True

    def target(self, step: int) -> int:
        return sum(self.quotas[: step + 1])


@dataclass(frozen=True)
class Repeat:
    """B entries are chosen again at every step, and old ones compete equally; after `steps` the last choice stays.

    In the end every entry in scope may have been touched. A dropped entry keeps its trained value and
    loses its optimizer state. Source: Agarwal et al. (2025), repeat-S.
    """

    budget: Budget
    steps: int | None
    every: int = 1

    keeps = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("steps", self.steps, "the number of optimizer steps at which the entries are chosen again")
        check_count("every", self.every, "how many steps lie between two selections")

    def resolve(self, eligible: int) -> Repeat:
        return dataclasses.replace(self, budget=resolve_budget(self.budget, eligible))

    def due(self, step: int) -> bool:
        return step % self.every == 0 and step < _count(self.steps)

    def target(self, step: int) -> int:
        del step
        return _count(self.budget)


@dataclass(frozen=True)
class Rounds:
    """Rounds of dense, then sparse training; each adds its share of the budget when its dense steps end.

    Round r of n consists of steps [r T / n, (r + 1) T / n), rounded down. `share` of them, a share (float)
    or a count (int), are dense; at least one step is dense and at least one is sparse. By the end of round
    r, (r + 1) B / n entries are selected, rounded down: exactly B in the end.

    >>> rounds = Rounds(budget=5, steps=12, share=0.5, rounds=2)
    >>> [t for t in range(14) if rounds.dense(t)], [rounds.target(t) for t in (2, 3, 8, 9, 99)]
    ([0, 1, 2, 6, 7, 8], [0, 2, 2, 5, 5])
    """

    budget: Budget
    steps: int | None
    share: int | float = 0.5
    rounds: int = 1

    keeps = True

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("steps", self.steps, "the number of optimizer steps of the run, dense and sparse")
        check_count("rounds", self.rounds, "how often dense training, selection and sparse training follow each other")
        share = self.share
        if (
            isinstance(share, bool)
            or not isinstance(share, int | float)
            or not share > 0
            or (isinstance(share, float) and share >= 1)
        ):
            raise ScheduleError(
                f"dense= is how much of a round is dense: a share below 1 (float) or steps (int), got {share!r}."
            )
        shortest = _count(self.steps) // self.rounds
        needed = 2 if isinstance(share, float) else share + 1
        if shortest < needed:
            raise ScheduleError(
                f"steps={self.steps} in rounds={self.rounds} leaves a round {shortest} steps; dense={share} needs at "
                f"least {needed}, of which one is sparse. Give more steps, fewer rounds or fewer dense steps."
            )

    def resolve(self, eligible: int) -> Rounds:
        return dataclasses.replace(self, budget=resolve_budget(self.budget, eligible))

    def dense(self, step: int) -> bool:
        return step < self._turn(step)

    def due(self, step: int) -> bool:
        return step == self._turn(step)

    def target(self, step: int) -> int:
        done = self._round(step) + (0 if self.dense(step) else 1)
        return done * _count(self.budget) // self.rounds

    def _round(self, step: int) -> int:
        steps = _count(self.steps)
        return min(self.rounds - 1, ((step + 1) * self.rounds - 1) // steps)

    def _turn(self, step: int) -> int:
        """The first sparse step of the round that this step is in."""
        steps, r = _count(self.steps), self._round(step)
        first, end = r * steps // self.rounds, (r + 1) * steps // self.rounds
        length = self.share if isinstance(self.share, int) else round(self.share * (end - first))
        return first + min(max(1, length), end - first - 1)


@dataclass(frozen=True)
class DropGrow:
    """B entries drawn at random before step 0; from time to time the least moved are dropped and others grow.

    This happens after step c if c mod S = A (`every` = S, `window` = A), c > 0 and c < E = until T. The
    share of a tensor's entries that is dropped and grown:

        linear     fraction (1 - c / E), and all of them the first time
        cosine     fraction (1 + cos(pi c / E)) / 2
        constant   fraction

    A window opens with the run and after every step c with (c + 1) mod S = 0. It closes when entries are
    dropped, so the first window has A steps and the others A + 1. `drop`: the smallest "change"
    |value - base|, or the smallest "weight" |value|. `regrow`: a dropped entry may grow again at once.
    Source: Ansell et al. (2024), SpIEL, arXiv 2401.16405, and its released code; Evci et al. (2020), RigL, arXiv
    1911.11134, for the cosine.

    >>> s = DropGrow(budget=100, steps=100, every=20, window=5, fraction=0.2, decay="linear")
    >>> [(c, float(s.share(c))) for c in range(1, 101) if s.due(c)]
    [(5, 1.0), (25, 0.15), (45, 0.11), (65, 0.07), (85, 0.03)]
    >>> [t for t in range(100) if s.opens(t)]
    [0, 19, 39, 59, 79]
    """

    budget: Budget
    steps: int | None
    every: int = 20
    window: int = 0
    fraction: float = 0.2
    decay: str = "linear"
    until: float = 1.0
    drop: str = "change"
    regrow: bool = True

    keeps = True

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("steps", self.steps, "the number of optimizer steps of the run")
        check_count("every", self.every, "how many steps lie between two times of dropping")
        if isinstance(self.window, bool) or not isinstance(self.window, int) or not 0 <= self.window < self.every:
            raise ScheduleError(
                f"window= is how many steps gradients are watched before entries are dropped: an int of at least 0 and "
                f"below every={self.every}, got {self.window!r}."
            )
        for name in ("fraction", "until"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ScheduleError(f"{name}= is a share above 0 and at most 1, got {value!r}.")
        for name, known in (("decay", ("linear", "cosine", "constant")), ("drop", ("change", "weight"))):
            if getattr(self, name) not in known:
                raise ScheduleError(f"Unknown {name} '{getattr(self, name)}'. Known: {', '.join(known)}.")

    def resolve(self, eligible: int) -> DropGrow:
        return dataclasses.replace(self, budget=resolve_budget(self.budget, eligible))

    def due(self, step: int) -> bool:
        return step > 0 and step % self.every == self.window and step < self._end

    def target(self, step: int) -> int:
        del step
        return _count(self.budget)

    def opens(self, step: int) -> bool:
        if self.window == 0 or not (step == 0 or (step + 1) % self.every == 0):
            return False
        return self.due(self.window if step == 0 else step + 1 + self.window)

    def share(self, step: int) -> Fraction:
        fraction, end = _exact(self.fraction), self._end
        if self.decay == "cosine":
            return fraction * Fraction((1 + math.cos(math.pi * float(step / end))) / 2)
        if self.decay == "constant":
            return fraction
        first = self.window or self.every
        return Fraction(1) if step == first else fraction * (1 - step / end)

    @property
    def _end(self) -> Fraction:
        return _exact(self.until) * _count(self.steps)


def _exact(value: float) -> Fraction:
    """The number as it was written: 0.2 is 1/5, so that no rounding changes a count."""
    return Fraction(str(value))


def _count(value: Budget) -> int:
    if not isinstance(value, int):
        raise ScheduleError(f"The schedule's budget {value!r} is not a count yet; call resolve(eligible) first.")
    return value
