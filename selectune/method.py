"""A method is a value composed of named axes.

>>> import selectune as st
>>> st.id3(budget=1000, steps=50).schedule
Increment(budget=1000, steps=50, every=1, spread='cumulative')
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from selectune.errors import BudgetError, ConfigError
from selectune.phases import DensePhase
from selectune.schedule import resolve_budget
from selectune.scope import Found, Scope, patterns
from selectune.select import GlobalTopK
from selectune.structure import Structure
from selectune.types import Allocating, DropAndGrow, Phased, Reads, Schedule, Score, Select

Patterns = str | Sequence[str]


@dataclass(frozen=True)
class Method:
    """scope x structure x score x select x schedule.

    Without a score nothing is selected, and the scope must train some tensors whole (`full`). A score
    that reads data takes it through `attach(..., calibration=batches, loss=callable)`. `dense`: what is
    trained at the schedule's dense steps, after which the score reads the change; without a schedule
    every step is dense.
    `structure`: what is selected as one unit, by default an entry (`selectune.structure`).
    `counted`: patterns of whole tensors that count in the budget, so that fewer entries are selected.
    `fill`: the value of unselected entries in scope while the tuner is on, "keep" for the base's or "zero".
    Zero needs the complete selection at `attach`, and a copy of the scope's weights.

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
    dense: DensePhase | None = None
    fill: str = "keep"
    structure: Structure = Structure()
    counted: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "counted", patterns(self.counted))
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
        if self.fill not in ("keep", "zero"):
            raise ConfigError(f"Unknown fill {self.fill!r}. Known: keep, zero.")
        if self.fill == "zero" and (self.score is None or self.score.reads in (Reads.GRADIENT, Reads.CHANGE)):
            raise ConfigError(
                'fill="zero" sets what is not selected to 0 before the first step, so the score must not read '
                f"what a step brings; got {'no score' if self.score is None else self.score.name}."
            )
        if self.score is None and not self.scope.train_fully and self.dense is None:
            raise ConfigError("A method without a score trains nothing unless its scope has train_fully patterns.")
        self._check_dense()
        self._check_drop_and_grow()
        self._check_structure()

    def _check_dense(self) -> None:
        if self.dense is not None and not isinstance(self.dense, DensePhase):
            raise ConfigError(f"dense must follow selectune.phases.DensePhase, got {type(self.dense).__name__}.")
        changes = self.score is not None and self.score.reads is Reads.CHANGE
        phased = isinstance(self.schedule, Phased)
        if self.schedule is not None and not (changes == phased == (self.dense is not None)):
            raise ConfigError(
                "Three things come together: a dense phase (dense=), a schedule that says which steps are dense, and "
                f"a score that reads the change. Got dense={self.dense!r}, the schedule {type(self.schedule).__name__} "
                f"that says {'which' if phased else 'none'}, a score that reads {getattr(self.score, 'reads', None)}."
            )

    def _check_drop_and_grow(self) -> None:
        factors = self.score is not None and self.score.reads is Reads.FACTORS
        if not isinstance(self.schedule, DropAndGrow):
            if factors:
                raise ConfigError(
                    f"The score '{getattr(self.score, 'name', '')}' reads the optimizer's numbers for rows and "
                    "columns, which exist late in a run; it needs a schedule that drops and grows, such as DropGrow."
                )
            return
        can = (Reads.NOTHING, Reads.WEIGHT, Reads.GRADIENT, Reads.FACTORS)
        if self.score is not None and self.score.reads not in can:
            raise ConfigError(
                f"Entries grow during training, so the score must read one of {', '.join(can)}; "
                f"'{self.score.name}' reads {self.score.reads}."
            )
        if not isinstance(self.select, Allocating):
            raise ConfigError(
                "A schedule that drops and grows keeps every tensor's number of entries, so it needs a selection "
                f"that divides them, such as PerTensor(); got {type(self.select).__name__}."
            )
        if self.fill != "keep":
            raise ConfigError(f'A schedule that drops and grows resets dropped entries; got fill="{self.fill}".')

    def _check_structure(self) -> None:
        if not isinstance(self.structure, Structure):
            raise ConfigError(
                f"structure must be a selectune.structure.Structure, got {type(self.structure).__name__}."
            )
        if self.structure.plain or self.score is None:
            return
        units = ", ".join(sorted(set(self.structure.all_units)))
        if self.score.reads in (Reads.GRADIENT, Reads.CHANGE, Reads.FACTORS) or isinstance(self.schedule, DropAndGrow):
            raise ConfigError(
                f"Whole units ({units}) are chosen before a step, by the weights, at random or from calibration data; "
                f"the score '{self.score.name}' reads {self.score.reads}, the schedule is "
                f"{type(self.schedule).__name__}. A score such as d3_pooled reads gradients before training."
            )
        if not isinstance(self.select, GlobalTopK | Allocating):
            raise ConfigError(
                f"Whole units ({units}) are taken by GlobalTopK or a selection that divides its quota, such as "
                f"PerTensor(); got {type(self.select).__name__}."
            )
        if "subnet" in self.structure.all_units and not isinstance(self.select, Allocating):
            raise ConfigError("Every tensor has one subnet, so select= must divide the budget, as PerTensor() does.")

    def resolve(self, found: Found) -> Schedule | None:
        """The schedule with its budget as the number of entries to select among the tensors found.

        Whole tensors that are `counted` are taken off it first. A density is of what is selected from and what is
        counted together. Raises BudgetError if nothing is left to select.
        """
        if self.schedule is None or not self.counted:
            return None if self.schedule is None else self.schedule.resolve(found.eligible)
        if not found.tensors:
            raise BudgetError(
                f"Nothing can be selected beside {', '.join(self.counted)}: every other tensor in scope is frozen. "
                "put_on(model, ..., freeze=False) puts an adapter on and leaves the base trainable."
            )
        whole = sum(t.parameter.numel() for t in found.whole if t.matches(self.counted))
        budget = resolve_budget(self.schedule.budget, found.eligible + whole)
        if budget <= whole:
            raise BudgetError(
                f"The budget of {budget:,} scalars covers the {whole:,} of {', '.join(self.counted)} too, which are "
                "trained whole, so none is left to select. Give more, or make these smaller (a lower rank)."
            )
        return dataclasses.replace(cast(Any, self.schedule), budget=budget - whole).resolve(found.eligible)

    def describe(self) -> dict[str, Any]:
        """The method as plain JSON values, as recorded in a delta."""
        dense = {} if self.dense is None else {"dense": {"name": type(self.dense).__name__, **_fields(self.dense)}}
        return {
            "name": self.name,
            "scope": {f.name: list(getattr(self.scope, f.name)) for f in dataclasses.fields(Scope)},
            "score": None if self.score is None else _score(self.score),
            "select": {"name": type(self.select).__name__, **_fields(self.select)},
            "schedule": None if self.schedule is None else {
                "name": type(self.schedule).__name__, **_fields(self.schedule)
            },
            **dense,
            **({"fill": self.fill} if self.fill != "keep" else {}),
            **({"counted": list(self.counted)} if self.counted else {}),
            **({} if self.structure.plain else {"structure": _fields(self.structure)}),
        }  # fmt: skip


def compose(
    name: str,
    score: Score,
    schedule: Schedule,
    scope: Scope | Patterns,
    train_fully: Patterns,
    select: Select | None = None,
    dense: DensePhase | None = None,
    fill: str = "keep",
    structure: Structure | None = None,
    counted: Patterns = (),
) -> Method:
    """A method whose scope is a Scope or patterns; `train_fully` adds to the scope's own."""
    if isinstance(scope, Scope):
        if patterns(train_fully):
            scope = dataclasses.replace(scope, train_fully=(*scope.train_fully, *patterns(train_fully)))
    else:
        scope = Scope(include=scope, train_fully=train_fully)
    return Method(
        scope, score, select or GlobalTopK(), schedule, name, dense, fill, structure or Structure(), patterns(counted)
    )


def _score(score: Score) -> dict[str, Any]:
    drawn = {"drawn": score.drawn} if score.drawn else {}
    return {"name": score.name, **_plain(score.parameters), **drawn}


def _plain(parameters: Any) -> dict[str, Any]:
    return {k: v if isinstance(v, str | int | float | bool | None) else repr(v) for k, v in parameters.items()}


def _fields(value: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value):
        return {}
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
