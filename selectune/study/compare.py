"""The methods of a study beside a reference: differences, their intervals and tests, and what these cannot say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from selectune.errors import ConfigError, StudyError, did_you_mean
from selectune.study.comparing import caveats
from selectune.study.comparing.contrast import Contrast
from selectune.study.comparing.counted import Runs, counted, resolved
from selectune.study.comparing.standing import Comparison, Standing
from selectune.study.records import Items, Record, Setting
from selectune.study.stats import effects, papers
from selectune.study.stats.anova import Anova, anova
from selectune.study.stats.given import Alternative, direction, share
from selectune.study.stats.holm import holm

BEST = "best"
"""As a reference: the baseline with the best mean of each task, chosen after seeing the results, as the papers do."""

Rule = Literal["last", "best"]
Pairing = Literal["seed", "papers"]


def compare(
    records: Iterable[Record],
    against: str,
    *,
    methods: Sequence[str] = (),
    rule: Rule = "last",
    pairing: Pairing = "seed",
    alpha: float = 0.05,
    alternative: Alternative = "greater",
    items: Mapping[str, Items] | None = None,
    seed: int = 0,
) -> Comparison:
    """Compares every method with a reference, task by task and with the same model and budget.

    `against`: a method, with its options if there are several of its name, or "best". `methods`: those to compare;
    all if empty. `rule`: the score of a run is that of the saved delta ("last") or the best of its evaluations.
    `pairing`: "seed" pairs runs of one seed; "papers" pairs each run with each. `alternative`: "greater" asks whether
    the method is better than the reference. `items`: what runs said of each row, by key of the cell; they are read for
    the rule "last" and pairs by seed. `seed`: of permutations and the bootstrap.

    A reference without this budget is taken with the only budget that it has. Holm's correction is over the methods of
    one task. Raises ConfigError for unknown names and StudyError for results that cannot be compared.
    """
    for name, value, known in (("rule", rule, get_args(Rule)), ("pairing", pairing, get_args(Pairing))):
        if value not in known:
            raise ConfigError(f"No {name} is '{value}'. Known: {', '.join(known)}.{did_you_mean(value, known)}")
    share(alpha, "Alpha")
    direction(alternative)
    records = list(records)
    runs = counted(records, rule)
    wanted = [resolved(name, runs) for name in methods] or list(dict.fromkeys(s.label for s in runs))
    reference = _references(against, wanted if methods else [], runs)
    runs = {setting: of for setting, of in runs.items() if setting.label in (*wanted, reference.get(setting.task))}
    how = Contrast(alpha, alternative, seed, items if rule == "last" else None)
    standings = _corrected([s for task, of in reference.items() for s in _standings(task, of, runs, how, pairing)])
    without = caveats.unmatched(standings, reference)
    if not any(standing.difference for standing in standings):
        raise StudyError(" ".join(["Nothing can be compared.", *(without or ["The reference is the only method."])]))
    kept = [record for record in records if record.setting in runs]
    warnings = [
        *([caveats.selected(reference)] if against == BEST else []),
        *([caveats.OPTIMISTIC] if rule == "best" else []),
        *([caveats.NOT_INDEPENDENT] if pairing == "papers" else []),
        *caveats.few_runs(standings, alpha),
        *caveats.unequal_runs(runs.values()),
        *without,
        *caveats.several_rates(kept),
        *caveats.unequal_search(kept),
        *caveats.zeros(standings),
        *caveats.approximate(standings),
        *caveats.few_seeds(standings),
        *caveats.no_rows(runs.values(), how.items or {}),
        *caveats.no_proof(standings, alpha),
    ]
    return Comparison(
        reference, rule, pairing, alpha, alternative, tuple(standings), _anovas(runs.values()), tuple(warnings)
    )


def _references(against: str, ours: Sequence[str], runs: Mapping[Setting, Runs]) -> dict[str, str]:
    """The reference of each task."""
    if against != BEST:
        return dict.fromkeys((setting.task for setting in runs), resolved(against, runs))
    if not ours:
        raise ConfigError("For a comparison with the best baseline, name the methods that are none (--methods id3).")
    tasks = dict.fromkeys(setting.task for setting in runs if setting.label in ours)
    return {task: _best_baseline(task, ours, runs) for task in tasks}


def _best_baseline(task: str, ours: Sequence[str], runs: Mapping[Setting, Runs]) -> str:
    """The best of those that have runs wherever ours have; full fine-tuning is left out."""
    here = [setting for setting in runs if setting.task == task]
    settings = [setting for setting in here if setting.label in ours]
    table = {}
    for name in dict.fromkeys(s.label for s in here if s.label not in ours and s.method.partition(":")[0] != "full"):
        met = [_partner(setting, name, here) for setting in settings]
        if None not in met:
            table[name] = {task: [value for s in dict.fromkeys(met) if s for value in runs[s].scores.values()]}
    if not table:
        raise StudyError(f"No baseline on {task} has runs with every model and budget of {', '.join(ours)}.")
    return papers.best_baselines(table, lowest=[task] if runs[settings[0]].lowest else [])[task]


def _partner(setting: Setting, name: str, among: Iterable[Setting]) -> Setting | None:
    """The setting of a method that another is compared with: of its budget, or else the only one there is."""
    found = [s for s in among if s.label == name and (s.model, s.task) == (setting.model, setting.task)]
    same = [s for s in found if s.budget == setting.budget]
    return same[0] if same else found[0] if len(found) == 1 else None


def _standings(
    task: str, reference: str, runs: Mapping[Setting, Runs], how: Contrast, pairing: str
) -> Iterator[Standing]:
    """Every method of a task, setting by setting, and over all its settings if it has several."""
    here = [setting for setting in runs if setting.task == task]
    for name in dict.fromkeys(s.label for s in here):
        own = [setting for setting in here if setting.label == name]
        for group in [*([setting] for setting in own), *([own] if len(own) > 1 else [])]:
            of = [runs[setting] for setting in group]
            met = [runs[s] for setting in group if (s := _partner(setting, reference, here))]
            if pairing == "papers" and len({theirs.setting for theirs in met}) < len(met):
                continue  # runs of the reference would count as new ones for each budget
            difference = None
            if name != reference and len(met) == len(of):
                test = how.by_seed if pairing == "seed" else how.by_each
                difference = test(reference, list(zip(of, met, strict=True)))
            scores = tuple(runs.scores for runs in of)
            yield Standing(
                name, task, of[0].metric, of[0].lowest, tuple(group), scores, _spread(scores), difference,
                of[0].untuned,
            )  # fmt: skip


def _spread(scores: Sequence[Mapping[int, float]]) -> effects.Spread:
    each = [effects.spread(list(of.values())) for of in scores]
    within = [spread.sd**2 for spread in each if spread.sd is not None]
    mean = float(np.mean([spread.mean for spread in each]))
    return effects.Spread(mean, float(np.sqrt(np.mean(within))) if within else None, sum(spread.n for spread in each))


def _corrected(standings: list[Standing]) -> list[Standing]:
    """With Holm's correction over the methods of each family."""
    ps: dict[tuple[str, bool, bool], list[float]] = {}
    for standing in standings:
        if standing.difference:
            ps.setdefault(standing.family, []).append(standing.difference.p)
    adjusted = {family: iter(holm(of)) for family, of in ps.items()}
    return [
        dataclasses.replace(
            standing,
            difference=dataclasses.replace(standing.difference, holm=next(adjusted[standing.family])),
        )
        if standing.difference
        else standing
        for standing in standings
    ]


def _anovas(runs: Iterable[Runs]) -> dict[str, Anova]:
    """By task, and by model if there are several: do the methods differ at all?

    Those with one run are left out, and so is the base, which differs from whatever was trained.
    """
    groups: dict[tuple[str, str], list[list[float]]] = {}
    for of in runs:
        if len(of.scores) > 1 and not of.untuned:
            groups.setdefault((of.setting.task, of.setting.model), []).append(list(of.scores.values()))
    many = len({model for _, model in groups}) > 1
    return {
        f"{task} with {model}" if many else task: anova(group)
        for (task, model), group in groups.items()
        if len(group) > 1 and any(np.ptp(values) > 1e-9 for values in group)
    }
