"""Schedules: step -> is it time to select, and how many entries are selected by then.

Every schedule here is a frozen value with the same five members (`selectune.types.Schedule`).
Steps are optimizer steps, numbered from 0; a step skipped by a gradient scaler is not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from selectune.errors import BudgetError, ScheduleError

Budget = int | float | None


def resolve_budget(budget: Budget, eligible: int) -> int:
    """A count of scalars out of a count or a density.

    An int is a count; a float below 1 is a density and is rounded to the nearest count; None is everything.

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
            f"budget={budget} is a float, so a density, and must lie between 0 and 1. For a count pass an int."
        )
    if isinstance(budget, int) and budget < 1:
        raise BudgetError(f"budget={budget}: at least 1 scalar must be trained.")


def check_count(name: str, value: int | None, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ScheduleError(f"{name}= is {what}: an int of at least 1 is needed, got {value!r}.")


@dataclass(frozen=True)
class OneShot:
    """All B entries at step 0, fixed from then on (static masks)."""

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
    """Unmask a share of the budget at every step: selected by the end of step t, floor((t+1) B / T).

    `every=k` selects the quotas of k steps at every k-th step, so the other steps need no dense
    gradient. `spread` says where the remainder of B / T goes when T does not divide B: "cumulative"
    spreads it, "front" gives one more to the first B mod T steps.
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
    """Any sequence u_0, u_1, ... of quotas; nothing is selected after its end.

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
    """B entries afresh at every step, old ones competing equally; after `steps` the last choice stays.

    The entries ever touched can grow to the whole scope; an entry that is dropped keeps its trained
    value and loses its optimizer state. Source: Agarwal et al. (2025), repeat-S.
    """

    budget: Budget
    steps: int | None
    every: int = 1

    keeps = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("steps", self.steps, "the number of optimizer steps at which the entries are chosen afresh")
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
    """Rounds of dense, then sparse training; each adds its share of the budget where its dense steps end.

    Round r of n is steps [r T / n, (r + 1) T / n), rounded down; `share` of them, a share (float) or a
    count (int), are dense, and at least one is and one is not. By the end of round r, (r + 1) B / n
    entries are selected, rounded down: exactly B in the end.

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


def _count(value: Budget) -> int:
    if not isinstance(value, int):
        raise ScheduleError(f"The schedule's budget {value!r} is not a count yet; call resolve(eligible) first.")
    return value
