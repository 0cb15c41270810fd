"""Which runs count: the finished ones of a study's main phase, checked so that they can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from selectune.errors import ConfigError, StudyError, did_you_mean
from selectune.study.records import Record, Setting, of_runs


@dataclass(frozen=True)
class Runs:
    """The runs of one setting: their `scores` and their cells, by seed, in the order of seeds.

    `elsewhere`: the runs have another task, and were only measured on this one. `untuned`: nothing was trained.
    """

    setting: Setting
    metric: str
    lowest: bool
    scores: Mapping[int, float]
    cells: Mapping[int, str]
    elsewhere: bool = False
    untuned: bool = False


def counted(records: Sequence[Record], rule: str) -> dict[Setting, Runs]:
    """The runs of each setting. `rule`: see `of_runs`. A run counts once its saved delta is measured.

    Raises StudyError for no runs, a score that is not finite, several metrics or numbers of rows on one task, and two
    different runs of one setting, rate and seed.
    """
    done = {record.cell for record in records if record.last}
    main = [record for record in records if record.phase == "main" and record.cell in done]
    if not main:
        raise StudyError(
            f"There is no finished run among these {len(records)} results, so nothing can be compared. Results of a "
            "search for rates do not count."
        )
    for record in main:
        if not math.isfinite(record.value):
            raise StudyError(f"Cell {record.cell} ({run_name(record)}) has the score {record.value}: no number.")
    last = [record for record in main if record.last]
    told: dict[str, Record] = {}
    cells: dict[tuple[Setting, int, float], str] = {}
    for record in last:
        first = told.setdefault(record.setting.task, record)
        for name, of in (("metric", "metrics"), ("lowest", "directions"), ("examples", "numbers of rows")):
            one, other = getattr(first, name), getattr(record, name)
            if one != other:
                raise StudyError(f"The runs on {record.setting.task} have several {of}: {one} and {other}.")
        cell = cells.setdefault((record.setting, record.seed, record.lr), record.cell)
        if cell != record.cell:
            raise StudyError(
                f"Cells {cell} and {record.cell} are both {run_name(record)} with the rate {record.lr:g}. They differ "
                "in settings that a table does not show, such as the number of epochs. Compare them apart."
            )
    of_seed = {(record.setting, record.seed): record.cell for record in last}
    untuned = {record.setting for record in last if record.steps == 0}
    own: dict[str, str] = {}
    for record in last:  # the results of a cell begin with its own task
        own.setdefault(record.cell, record.setting.task)
    return {
        setting: Runs(
            setting,
            told[setting.task].metric,
            told[setting.task].lowest,
            dict(sorted(scores.items())),
            {seed: of_seed[setting, seed] for seed in sorted(scores)},
            any(own[of_seed[setting, seed]] != setting.task for seed in scores),
            setting in untuned,
        )
        for setting, scores in of_runs(main, rule).items()
    }


def run_name(record: Record) -> str:
    """A run as a message names it: method, task, seed."""
    return f"{record.setting.label} on {record.setting.task}, seed {record.seed}"


def resolved(name: str, runs: Iterable[Setting]) -> str:
    """The method of this name, or the only one that has it without options or adapter. Raises ConfigError.

    >>> resolved("id3", [Setting("demo", "glue/rte", "id3:exp=1", "lora:r=2"), Setting("demo", "glue/rte", "full")])
    'id3:exp=1+lora:r=2'
    """
    known = {setting.label: setting for setting in runs}
    found = [name] if name in known else [one for one, setting in known.items() if name in _short(setting)]
    if len(found) > 1:
        raise ConfigError(f"'{name}' names several methods of these results: {', '.join(found)}. Name one in full.")
    if not found:
        raise ConfigError(
            f"These results have no method '{name}'. They have: {', '.join(known)}.{did_you_mean(name, list(known))}"
        )
    return found[0]


def _short(setting: Setting) -> set[str]:
    """A method without its options, and with and without its adapter."""
    bare = setting.method.partition(":")[0]
    return {bare, setting.method, bare if setting.on is None else f"{bare}+{setting.on}"}
