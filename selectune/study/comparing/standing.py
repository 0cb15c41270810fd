"""What is found of a method on a task, and of a whole study."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from selectune.study.records import Setting
from selectune.study.stats.anova import Anova
from selectune.study.stats.effects import Spread
from selectune.study.stats.intervals import Interval
from selectune.study.stats.mcnemar import McNemar
from selectune.study.stats.permutation import Permutation
from selectune.study.stats.wilcoxon import SignedRank


@dataclass(frozen=True)
class Difference:
    """A method minus the method `against`, on one task, in units of the metric: of a loss, it is good to lie below 0.

    `interval`: Student's for pairs, Welch's for the papers' pairing; None for one run. `test`: Wilcoxon's, in which a
    better score is positive. `permutation`: of the signs of pairs, or of the labels of runs. `p`: Wilcoxon's, but the
    permutation's for the papers' pairing, where Wilcoxon's is not valid; `holm`: that p among the methods of the task.
    `smallest`: the smallest p that so many runs can give. `cohen`: of pairs, or of unpaired runs.
    `detectable`: the smallest true difference that a t-test would have seen with 80 % power. `over_items`: a bootstrap
    over seeds and validation rows, where the metric is the mean of known scores of rows. `mcnemar`: by seed, for scores
    of 0 and 1.
    """

    against: str
    mean: float
    interval: Interval | None
    test: SignedRank
    permutation: Permutation
    p: float
    smallest: float
    cohen: float | None
    cliff: float
    detectable: float | None
    holm: float = 1.0
    over_items: Interval | None = None
    mcnemar: Mapping[int, McNemar] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """A method on a task. `runs`: the scores by seed, for each of its `settings`.

    Several settings are the budgets or models of one method, tested together: by seed, the differences of a seed are
    averaged over them first. The mean is the mean over settings, and the spread is that within a setting. `untuned`:
    the base itself.
    """

    method: str
    task: str
    metric: str
    lowest: bool
    settings: tuple[Setting, ...]
    runs: tuple[Mapping[int, float], ...]
    spread: Spread
    difference: Difference | None = None
    untuned: bool = False

    @property
    def family(self) -> tuple[str, bool, bool]:
        """The tests that Holm's correction is over are those of a task, apart where they are over several settings.

        The base is no method that was tried, so no method pays for it.
        """
        return self.task, self.pooled, self.untuned

    @property
    def pooled(self) -> bool:
        return len(self.settings) > 1


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `against`: the reference of each task. `anova`: over the methods of a task and model.

    `warnings`: what the numbers cannot say, in sentences, each once.
    """

    against: Mapping[str, str]
    rule: str
    pairing: str
    alpha: float
    alternative: str
    standings: tuple[Standing, ...]
    anova: Mapping[str, Anova]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
