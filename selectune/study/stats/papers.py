"""What the papers on ID3 do (arXiv 2408.14470, both versions), so that their numbers can be made again.

It is not what this library advises: n x n pairs are not independent, and a baseline that is chosen after seeing the
results is itself a selection. `selectune compare` says so wherever it uses this file.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from selectune.errors import StudyError
from selectune.study.stats.given import Numbers, sample

NINE = (
    "glue/mnli", "glue/mnli-mm", "glue/qqp", "glue/qnli", "glue/sst2", "glue/stsb", "glue/cola", "glue/mrpc", "glue/rte"
)  # fmt: skip
"""The columns of the papers' GLUE tables, in their order. MNLI has two, so their average counts it twice."""

_AVERAGES = {"avg", "average", "mean", "overall", "all"}


def rounded(differences: Numbers, digits: int = 10) -> NDArray[np.float64]:
    """Differences without the noise of binary fractions, so that equal ones are tied: 0.3 - 0.2 and 0.2 - 0.1.

    >>> rounded([0.3 - 0.2, 0.2 - 0.1]).tolist()
    [0.1, 0.1]
    """
    return np.round(sample(differences, 0, "the differences"), digits)


def n_by_n(
    ours: Mapping[Hashable, Numbers], theirs: Mapping[Hashable, Numbers], digits: int | None = 10
) -> NDArray[np.float64]:
    """All differences of a run of ours and a run of theirs within each configuration, one after the other.

    `ours`, `theirs`: the runs by configuration, such as a budget or (task, budget). With n runs each, a configuration
    gives n^2 differences, of which at most n are independent. `digits=None` leaves them unrounded. Raises StudyError
    for configurations that only one of them has, and for an average among several of them: it repeats the others.

    >>> n_by_n({"rte": [3, 5]}, {"rte": [1, 4]}).tolist()
    [2.0, -1.0, 4.0, 1.0]
    """
    if not ours or set(ours) != set(theirs):
        raise StudyError(
            "Both methods need runs in the same configurations, and at least one; "
            f"got {', '.join(map(str, ours)) or 'none'} and {', '.join(map(str, theirs)) or 'none'}."
        )
    _refuse_averages(ours)
    found = [
        np.subtract.outer(
            sample(ours[key], name=f"our runs of {key}"), sample(theirs[key], name=f"their runs of {key}")
        )
        for key in ours
    ]
    pairs = np.concatenate([block.ravel() for block in found])
    return pairs if digits is None else rounded(pairs, digits)


def _refuse_averages(keys: Collection[Hashable]) -> None:
    parts = [key if isinstance(key, tuple) else (key,) for key in keys]
    found = [part for key in parts for part in key if isinstance(part, str) and part.lower().strip(". ") in _AVERAGES]
    if found and len(keys) > 1:
        raise StudyError(
            f"'{found[0]}' is an average of the other columns: its difference repeats theirs and is no further pair. "
            "Leave it out, or test it alone."
        )


def best_baselines(
    table: Mapping[str, Mapping[str, Numbers]], leave_out: Collection[str] = ("full",), lowest: Collection[str] = ()
) -> dict[str, str]:
    """The baseline with the best mean of each column: over its runs, or over the models of a table of models.

    `table[method][column]`: its scores. `leave_out`: methods that are no baseline, full fine-tuning by custom.
    `lowest`: the columns in which a lower score is better. The first of equal ones is taken. Raises StudyError if
    nothing is left to choose from.

    >>> best_baselines({"pafi": {"rte": [80, 82]}, "lora": {"rte": [79, 85]}, "full": {"rte": [99]}})
    {'rte': 'lora'}
    """
    columns = dict.fromkeys(column for row in table.values() for column in row)
    found = {}
    for column in columns:
        means = {
            method: sample(row[column], name=f"{method} on {column}").mean() * (-1 if column in lowest else 1)
            for method, row in table.items()
            if method not in leave_out and column in row
        }
        if not means:
            raise StudyError(f"There is no baseline for {column}: all of its methods are left out.")
        found[column] = max(means, key=means.__getitem__)
    return found


def nine_columns(scores: Mapping[str, float]) -> float:
    """The average of the papers' GLUE tables: over nine columns, of which MNLI has two.

    Raises StudyError, which names them, for missing columns.

    >>> nine_columns({task: 90.0 for task in NINE})
    90.0
    """
    missing = [task for task in NINE if task not in scores]
    if missing:
        raise StudyError(f"The average of nine columns needs all of them; missing: {', '.join(missing)}.")
    return float(sample([scores[task] for task in NINE], name="the nine columns").mean())


def best_runs(values: Sequence[float], keep: int = 3, lowest: bool = False) -> float:
    """The mean of the best runs: 3 of 4 in the first version of the paper; its second takes the mean of all 4.

    Choosing runs by the score that is reported makes that score too good. Raises StudyError for fewer than `keep`.

    >>> best_runs([80.0, 90.0, 70.0, 85.0]), best_runs([80.0, 90.0, 70.0, 85.0], keep=4)
    (85.0, 81.25)
    """
    array = np.sort(sample(values, keep, "the runs"))
    return float(array[:keep].mean() if lowest else array[::-1][:keep].mean())
