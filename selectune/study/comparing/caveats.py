"""What the numbers of a comparison cannot say, in plain sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from selectune.files.reading import some
from selectune.study.comparing.counted import Runs, run_name
from selectune.study.comparing.standing import Standing
from selectune.study.records import Items, Record, Setting

OPTIMISTIC = (
    "The score of a run is the best of its evaluations, chosen on the rows that it is reported on. It is too good; the "
    "last score (--rule last) is not chosen."
)
FEW_SEEDS = (
    "Fewer than 6 seeds say little of how seeds differ. The interval over seeds and rows widens their part by "
    "Student's t, which is right where their differences are about normal."
)
NOT_INDEPENDENT = (
    "Each run is paired with each run, so the pairs are not independent: n counts pairs, and Wilcoxon's p is far too "
    "small. The p of the permutation, beside it, exchanges the labels of whole runs and is valid; Holm's correction is "
    "of that one."
)


def unequal_runs(runs: Iterable[Runs]) -> list[str]:
    """Names the seeds that some methods of a task have and others lack."""
    seeds: dict[tuple[str, str], set[int]] = {}
    runs = list(runs)
    for of in runs:
        seeds.setdefault((of.setting.model, of.setting.task), set()).update(of.scores)
    lacking = [
        f"{of.setting.label} on {of.setting.task} lacks {', '.join(map(str, missing))}"
        for of in runs
        if (missing := sorted(seeds[of.setting.model, of.setting.task] - set(of.scores)))
    ]
    return [f"Methods have unequal numbers of runs. Missing seeds: {some(lacking)}."] if lacking else []


def unmatched(standings: Iterable[Standing], reference: Mapping[str, str]) -> list[str]:
    """Methods without a run to be compared with."""
    names = [
        f"{standing.method} on {standing.task}"
        for standing in standings
        if standing.difference is None and standing.method != reference[standing.task]
    ]
    reason = "the reference has no run with their model and budget, or none of the same seed"
    return [f"Not compared, because {reason}: {some(names)}."] if names else []


def several_rates(records: Iterable[Record]) -> list[str]:
    rates: dict[tuple[Setting, int], set[float]] = {}
    names = {}
    for record in records:
        if record.phase == "main" and record.last:
            rates.setdefault((record.setting, record.seed), set()).add(record.lr)
            names[record.setting, record.seed] = run_name(record)
    found = [names[key] for key, of in rates.items() if len(of) > 1]
    return [f"Several learning rates were run, of which one counts: {some(found)}."] if found else []


def unequal_search(records: Iterable[Record]) -> list[str]:
    """Methods whose rates were searched with more trials than others'."""
    trials: dict[tuple[str, str], dict[Setting, set[str]]] = {}
    for record in records:
        setting = record.setting
        if record.steps == 0:  # nothing was trained, so there is no rate
            continue
        cells = trials.setdefault((setting.model, setting.task), {}).setdefault(setting, set())
        if record.phase == "search":
            cells.add(record.cell)
    said = []
    for (_, task), of in trials.items():
        if len({len(cells) for cells in of.values()}) > 1:
            counts = dict.fromkeys(f"{setting.label} had {len(cells)}" for setting, cells in of.items())
            said.append(f"on {task} {some(list(counts), ', ', 12)}")
    return [f"Rates were not searched equally, which favours those with more trials: {some(said)}."] if said else []


def few_runs(standings: Sequence[Standing], alpha: float) -> list[str]:
    """Comparisons that no result could have made significant."""
    many = Counter(standing.family for standing in standings if standing.difference)
    names: dict[tuple[float, int], list[str]] = {}
    for standing in standings:
        if (found := standing.difference) and found.smallest * many[standing.family] > alpha:
            key = (found.smallest, 1 if found.smallest > alpha else many[standing.family])
            names.setdefault(key, []).append(f"{standing.method} on {standing.task}")
    return [
        f"So few runs that differ can give no p below {smallest:g}"
        + (f", and Holm's correction takes the smallest of {methods} times {methods}" if methods > 1 else "")
        + f", so these could not pass {alpha:g}: {some(found)}."
        for (smallest, methods), found in sorted(names.items())
    ]


def zeros(standings: Iterable[Standing]) -> list[str]:
    found = [
        f"{test.zeros} of {test.zeros + test.n} for {standing.method} on {standing.task}"
        for standing in standings
        if standing.difference and (test := standing.difference.test).zeros
    ]
    return [f"Differences of 0 are dropped by Wilcoxon's test: {some(found)}."] if found else []


def approximate(standings: Iterable[Standing]) -> list[str]:
    some_are = any(standing.difference and not standing.difference.test.exact for standing in standings)
    return ["With more than 50 pairs, Wilcoxon's p is a normal approximation."] if some_are else []


def no_proof(standings: Iterable[Standing], alpha: float) -> list[str]:
    if not any(standing.difference and standing.difference.holm > alpha for standing in standings):
        return []
    return [
        f"A p above {alpha:g} does not show that methods are equal; a true difference below the smallest detectable "
        "one can well be missed."
    ]


def selected(chosen: Mapping[str, str]) -> str:
    """That the reference was the best baseline, by name."""
    names = some([f"{method} on {task}" for task, method in chosen.items()], ", ", 12)
    return (
        f"The reference is the best baseline of each task, chosen after seeing the results: {names}. That is itself a "
        "selection, and no test here allows for it. Full fine-tuning is not among the baselines."
    )


def no_rows(runs: Iterable[Runs], items: Mapping[str, Items]) -> list[str]:
    """Tasks that runs were measured on beside their own, and of whose rows nothing was kept."""
    lacking = [
        of.setting.task
        for of in runs
        if of.elsewhere and any(of.setting.task not in items[c].measured for c in of.cells.values() if c in items)
    ]
    return (
        [
            f"Runs of an earlier version were measured on {some(list(dict.fromkeys(lacking)), ', ', 12)} without "
            "keeping what they said of each row, so the tests over rows are left out there."
        ]
        if lacking
        else []
    )


def few_seeds(standings: Sequence[Standing]) -> list[str]:
    few = any(s.difference and s.difference.over_items and s.difference.over_items.freedom < 5 for s in standings)
    return [FEW_SEEDS] if few else []
