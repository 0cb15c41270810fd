"""The difference of two methods: its interval, its tests, its size, and what could have been seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selectune.errors import StudyError
from selectune.study.comparing.counted import Runs
from selectune.study.comparing.standing import Difference
from selectune.study.records import Items
from selectune.study.stats import effects, intervals, papers, permutation, power
from selectune.study.stats.given import Alternative
from selectune.study.stats.mcnemar import mcnemar
from selectune.study.stats.wilcoxon import smallest_p, wilcoxon

Blocks = Sequence[tuple[Runs, Runs]]
"""The runs of a method and of its reference, for each model and budget."""

_DRAWS = 2000


@dataclass(frozen=True)
class Contrast:
    """How differences are tested. `items`: what runs said of each row, by key of the cell."""

    alpha: float
    alternative: Alternative
    seed: int
    items: Mapping[str, Items] | None

    def by_seed(self, against: str, blocks: Blocks) -> Difference | None:
        """Pairs of runs with one seed, model and budget; None if there is no pair.

        Runs of one seed are not independent, so a seed gives one difference: its mean over models and budgets.
        """
        seeds = sorted(set.intersection(*(set(runs.scores) for block in blocks for runs in block)))
        pairs = papers.rounded([float(np.mean([a.scores[seed] - b.scores[seed] for a, b in blocks])) for seed in seeds])
        if not pairs.size:
            return None
        signed = _sign(blocks) * pairs
        found = self._difference(
            against,
            signed,
            blocks,
            intervals.student(pairs, 1 - self.alpha) if pairs.size > 1 else None,
            permutation.sign_flips(signed, self.alternative, seed=self.seed),
            effects.cohen_paired(pairs),
            smallest_p(int(np.count_nonzero(pairs)), self.alternative),
        )
        return self._on_items(found, *blocks[0]) if self.items and len(blocks) == 1 else found

    def by_each(self, against: str, blocks: Blocks) -> Difference:
        """The papers' pairs: each run with each of one model and budget. The permutation exchanges labels of runs."""
        sign = _sign(blocks)
        ours, theirs = ([sign * np.array(list(block[which].scores.values())) for block in blocks] for which in (0, 1))
        centres = [np.concatenate(pair).mean() for pair in zip(ours, theirs, strict=True)]
        permuted = permutation.labels(ours, theirs, self.alternative, seed=self.seed)
        interval = None
        if min(runs.size for runs in (*ours, *theirs)) > 1:
            interval = intervals.welch(*([sign * runs for runs in of] for of in (ours, theirs)), level=1 - self.alpha)
        cohen = effects.cohen(
            *(np.concatenate([runs - at for runs, at in zip(of, centres, strict=True)]) for of in (ours, theirs))
        )
        smallest = min(1.0, (2 if self.alternative == "two-sided" else 1) / permuted.cases)
        signed = papers.n_by_n(dict(enumerate(ours)), dict(enumerate(theirs)))
        return self._difference(against, signed, blocks, interval, permuted, cohen and sign * cohen, smallest, True)

    def _difference(
        self,
        against: str,
        signed: NDArray[np.float64],
        blocks: Blocks,
        interval: intervals.Interval | None,
        permuted: permutation.Permutation,
        cohen: float | None,
        smallest: float,
        crossed: bool = False,
    ) -> Difference:
        sign, test = _sign(blocks), wilcoxon(signed, self.alternative)
        each = [np.subtract.outer(list(a.scores.values()), list(b.scores.values())).ravel() for a, b in blocks]
        seen = interval and power.detectable(interval.error, interval.freedom, self.alpha, alternative=self.alternative)
        return Difference(
            against,
            sign * permuted.difference,
            interval,
            test,
            permuted,
            permuted.p if crossed else test.p,
            smallest,
            cohen,
            float(np.sign(papers.rounded(np.concatenate(each))).mean()),
            seen,
        )

    def _on_items(self, found: Difference, ours: Runs, theirs: Runs) -> Difference:
        """With what the scores of single rows say, where both runs of a seed have them."""
        rows: dict[int, list[NDArray[np.float64]]] = {}
        for seed in (seed for seed in ours.scores if seed in theirs.scores):
            told = [items_of(runs, seed, self.items or {}) for runs in (ours, theirs)]
            scores = [np.asarray(items.scores, float) for items in told if items and items.scores is not None]
            if len(scores) == 2:
                rows[seed] = scores
        sizes = sorted({score.size for pair in rows.values() for score in pair})
        if len(sizes) > 1:
            raise StudyError(f"The runs on {ours.setting.task} have scores of {sizes[0]} rows and of {sizes[-1]}.")
        if not rows or not sizes[0]:
            return found
        table = np.array([a - b for a, b in rows.values()])
        over = None
        if len(rows) > 1 and abs(table.mean() - found.mean) < 1e-6:  # the metric is the mean over rows
            over = intervals.bootstrap(table, 1 - self.alpha, _DRAWS, self.seed)
        binary = np.isin(list(rows.values()), (0.0, 1.0)).all()
        by_seed = {seed: mcnemar(*pair) for seed, pair in rows.items()} if binary else {}
        return dataclasses.replace(found, over_items=over, mcnemar=by_seed)


def items_of(runs: Runs, seed: int, items: Mapping[str, Items]) -> Items | None:
    """What a run said of each row of the task that its score is of; None where that was not kept."""
    found = items.get(runs.cells[seed])
    return found.measured.get(runs.setting.task) if found and runs.elsewhere else found


def _sign(blocks: Blocks) -> int:
    return -1 if blocks[0][0].lowest else 1
