"""Several patterns of one task, whose models label more rows, from which one model learns: PET and iPET."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selectune import tasks
from selectune.errors import ConfigError, TaskError
from selectune.files import checkpoints, make_folder, read_json, read_lines, write_durably
from selectune.models.evaluate import evaluate
from selectune.models.predictions import predict_rows
from selectune.models.restore import Source, ready
from selectune.runs.config import RunConfig
from selectune.runs.folder import RUN_FILE, RunFolder, run_folder
from selectune.runs.result import Progress, RunResult
from selectune.runs.resume import settings_of
from selectune.runs.stop import Stop
from selectune.runs.training import run
from selectune.tasks import Example
from selectune.tasks.soft import PREDICTION, counts_of
from selectune.train import world

log = logging.getLogger("selectune")

FOLDER, RECORD, ROWS, SOFT = "ensemble", "ensemble.json", "unlabelled.jsonl", "soft-labels.jsonl"
STUDENTS = ("head", "pattern")
OTHERS = 0.25
"""The share of the other models that label the rows of a model's next generation, as in the paper; one at least."""


@dataclass(frozen=True)
class Ensemble:
    """What an ensemble is made of, beside the settings of its runs.

    `patterns`: two or more, and `words`, those of all or of each; see `selectune.tasks.Cloze`. `unlabelled`: a file of
    rows with the task's texts. `generations`: how often a model of each pattern is trained; the first learns from the
    labelled rows, and each later one from `growth` times as many as the one before (`selectune.tasks.surest`). The last
    one gives soft labels at `temperature` (`selectune.tasks.soft_labels`) to all unlabelled rows. What learns from them
    is a classifier with a `student` of "head", or the first pattern's cloze, "pattern".

    Raises ConfigError.
    """

    patterns: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    unlabelled: str
    generations: int = 1
    growth: int = 5
    temperature: float = 2.0
    student: str = "head"

    def __post_init__(self) -> None:
        if len(self.patterns) < 2:
            raise ConfigError(
                f"An ensemble needs two patterns at least, got {len(self.patterns)}. With one, train on labelled rows "
                "without unlabelled ones."
            )
        if len(self.words) not in (1, len(self.patterns)):
            raise ConfigError(
                f"{len(self.patterns)} patterns need one list of words, or as many lists, got {len(self.words)} "
                "(command line: --words once, or once for each --pattern)."
            )
        if len(set(self.members)) < len(self.patterns):
            raise ConfigError("Two of the patterns are the same and have the same words; such models label alike.")
        for name, least in (("generations", 1), ("growth", 2)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise ConfigError(f"{name}={value!r}: must be an int of at least {least}.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature={self.temperature!r}: must be a finite number above 0.")
        if self.student not in STUDENTS:
            raise ConfigError(f"Unknown student '{self.student}'. Known: {', '.join(STUDENTS)}.")

    @property
    def members(self) -> list[tuple[str, tuple[str, ...]]]:
        """Each pattern with its words."""
        words = self.words if len(self.words) > 1 else self.words * len(self.patterns)
        return list(zip(self.patterns, words, strict=True))


def run_ensemble(
    config: RunConfig,
    plan: Ensemble,
    progress: Progress | None = None,
    resume: bool = False,
    overwrite: bool = False,
    stop: Stop | None = None,
    folder: RunFolder | None = None,
) -> tuple[RunResult, dict[str, Any]]:
    """Trains the models of an ensemble and one that learns from them; gives its result, and the record of all.

    Every run has the settings of `config`, which has no pattern. The last one is in its `out`, as any run is, and those
    of the ensemble are in `out`/ensemble/generation-G/pattern-P, with their answers to the unlabelled rows.
    out/ensemble/ensemble.json records settings, weights, and rows and metric of each. `resume`: what is done there is
    kept, and a run that was stopped goes on from its newest checkpoint. The same settings give the same bits.

    Raises ConfigError and TaskError before anything is trained, and what `run` raises.

    Source: Schick, Schütze 2021, arXiv 2001.07676, sections 3.2 to 3.4, with one model for each pattern.
    """
    if world.size() > 1:
        raise ConfigError("An ensemble trains in one process. Start it without torchrun or accelerate launch.")
    if config.out is None:
        raise ConfigError("out is missing: the folder that the delta is written to.")
    if resume and overwrite:
        raise ConfigError("resume goes on with the ensemble in out and overwrite removes it: give one of the two.")
    if config.soft_labels is not None:
        raise ConfigError("An ensemble makes the soft labels itself: give unlabelled rows or soft labels, not both.")
    with run_folder(config.out, resume, overwrite) if folder is None else nullcontext(folder) as owned:
        made = _Made(config, plan, progress, stop or Stop())
        made.begin(owned, resume, overwrite)
        made.generations()
        return made.student(owned)


class _Made:
    """An ensemble on its way: its runs, the rows that they learn from, and what they say of the unlabelled ones."""

    def __init__(self, config: RunConfig, plan: Ensemble, progress: Progress | None, stop: Stop) -> None:
        self.config, self.plan, self.progress, self.stop = config, plan, progress, stop
        self.place = Path(str(config.out)) / FOLDER
        self.runs = [dataclasses.replace(config, pattern=p, words=w) for p, w in plan.members]
        self.clozes = [each.the_task for each in self.runs]
        self.task = config.the_task
        hold_out = None if config.train is not None else config.hold_out
        labelled = tasks.splits_of(self.task, config.data, hold_out)["train"]
        if config.train_size is not None:
            labelled = tasks.first_rows(self.task, labelled, config.train_size, config.train_size_seed)
        self.labelled = labelled
        rows = tasks.read_rows(plan.unlabelled, "train")
        rows = rows._replace(numbered=list(rows.numbered))
        if not rows.numbered:
            raise TaskError(f"{rows.origin} has no rows to label.")
        self.unlabelled = tasks.load(tasks.unlabelled(self.task, (), rows), "validation")
        self.source = Source(config.model, config.revision, config.dtype, config.trust_remote_code)
        self.record: dict[str, Any] = {}
        self.said = torch.empty(0)

    def begin(self, folder: RunFolder, resume: bool, overwrite: bool) -> None:
        """Makes room for the record, or refuses to; or compares it, if the ensemble goes on."""
        made_of = {**dataclasses.asdict(self.plan), "unlabelled": self.unlabelled.digest}
        settings = {**settings_of(self.config), "ensemble": made_of, "labelled": self.labelled.digest}
        settings = json.loads(json.dumps(settings))
        path = self.place / RECORD
        if path.exists() and resume:
            told = read_json(path, limit=1 << 26, error=ConfigError)
            there = told.get("settings") if isinstance(told, dict) else None
            if there != settings:
                names = [n for n in settings if not isinstance(there, dict) or there.get(n) != settings[n]]
                raise ConfigError(
                    f"{path} is of an ensemble with other settings or rows: {', '.join(names)}. Resume with those that "
                    "made it, or give another folder."
                )
            self.record = told
            return
        if resume and not self.place.exists():
            raise ConfigError(f"There is no ensemble to resume in {self.config.out}. Start anew without resume.")
        if self.place.exists() and not resume and not overwrite:
            raise ConfigError(
                f"{self.place} holds runs of an ensemble. Go on with it (resume=True, command line: --resume), give "
                "another folder, or say that it may go (overwrite=True, command line: --overwrite)."
            )
        self.record = {"settings": settings, "weights": self._weights(), "generations": []}
        folder.begin(None)  # now, since the last model's run would go on from the checkpoints of an earlier run
        if self.place.exists():
            shutil.rmtree(self.place)
        make_folder(self.place)
        texts = (dict(zip(self.task.fields, e.texts, strict=True)) for e in self.unlabelled.examples)
        write_durably(self.place / ROWS, b"".join(json.dumps(row).encode() + b"\n" for row in texts))
        self._write()

    def generations(self) -> None:
        """Trains a model of each pattern, and the next generation on rows that others have labelled."""
        self.record["generations"] = []
        for number in range(1, self.plan.generations + 1):
            told, said = [], []
            for member, config in enumerate(self.runs):
                examples = self._learns_from(number, member)
                folder = self.place / f"generation-{number}" / f"pattern-{member + 1}"
                value = self._trained(config, folder, examples if number > 1 else None)
                said.append(self._answers(folder))
                told.append({"rows": counts_of(self.task, examples), "value": value})
            self.said = torch.stack(said)
            self.record["generations"].append(told)
            self._write()

    def student(self, folder: RunFolder) -> tuple[RunResult, dict[str, Any]]:
        """The model that learns from the soft labels of all."""
        soft = tasks.soft_labels(self.said, self.record["weights"], self.plan.temperature)
        rows = [Example(e.texts, q) for e, q in zip(self.unlabelled.examples, soft.tolist(), strict=True)]
        tasks.write_soft(self.task, rows, self.place / SOFT)
        config = self.config if self.plan.student == "head" else self.runs[0]
        last = dataclasses.replace(config, soft_labels=str(self.place / SOFT), train_size=None)
        if self.plan.student == "head":
            last = dataclasses.replace(last, shots=None)
        found = run(last, self.progress, bool(checkpoints(folder.path)), False, self.stop, folder)
        self.record["student"] = {"rows": len(rows), "value": found.value}
        self._write()
        return found, self.record

    def _write(self) -> None:
        write_durably(self.place / RECORD, json.dumps(self.record, indent=2).encode())

    def _weights(self) -> list[float]:
        """The accuracy of the base on the labelled rows, by each pattern."""
        weights = []
        for config, cloze in zip(self.runs, self.clozes, strict=True):
            if config.shots is not None:
                cloze = tasks.with_shots(cloze, tasks.first_rows(cloze, self.labelled, config.shots).examples)
            loaded, length = ready(self.source, None, cloze, config.max_length)
            rows = cloze.encode(loaded.tokenizer, self.labelled.examples, length)
            found = evaluate(loaded.model, loaded.tokenizer, cloze, rows)
            right = sum(p == a for p, a in zip(found.predictions, found.answers, strict=True))
            weights.append(right / len(rows))
        return weights

    def _learns_from(self, generation: int, member: int) -> Sequence[Example]:
        """The labelled rows, and from the second generation on the surest of those that other models label."""
        labelled = self.labelled.examples
        if generation == 1:
            return labelled
        others = [i for i in range(len(self.runs)) if i != member]
        count = max(1, round(OTHERS * len(others)))
        chosen = sorted(random.Random(f"{self.config.seed}/{generation}/{member}").sample(others, count))
        soft = tasks.soft_labels(self.said[chosen], [self.record["weights"][i] for i in chosen], 1.0)
        factor = self.plan.growth ** (generation - 1)
        found = tasks.surest(soft, counts_of(self.task, labelled), factor)
        if len(found) < (factor - 1) * len(labelled):
            log.warning(
                "Generation %d of pattern %d has %d new rows in place of %d: no more were given one of its classes.",
                generation, member + 1, len(found), (factor - 1) * len(labelled),
            )  # fmt: skip
        return [*labelled, *(Example(self.unlabelled.examples[row].texts, label) for row, label in found)]

    def _trained(self, config: RunConfig, folder: Path, examples: Sequence[Example] | None) -> float:
        """The metric of a run in this folder, which is trained or gone on with if it is not done."""
        path = folder / RUN_FILE
        self.stop.where = f"and what is done is in {self.place}: the same with resume=True goes on (--resume)"
        if not path.exists():
            config = dataclasses.replace(config, out=str(folder))
            if examples is not None:
                make_folder(folder)
                rows = folder / "rows.jsonl"
                tasks.write_soft(self.task, examples, rows)
                config = dataclasses.replace(config, soft_labels=str(rows), train_size=None)
            begun = bool(checkpoints(folder))
            run(config, self.progress, begun, not begun, self.stop)
            self.stop.where = f"and what is done is in {self.place}: the same with resume=True goes on (--resume)"
        return float(read_json(path, limit=1 << 26, error=ConfigError)["value"])

    def _answers(self, folder: Path) -> Tensor:
        """The probabilities that a run's model gives to the unlabelled rows: (rows, classes), float64."""
        out = folder / "answers.jsonl"
        if not out.exists():
            predict_rows(self.source, str(folder), str(self.place / ROWS), str(out))
        told = [row[PREDICTION]["probabilities"] for _, row in read_lines(out, error=ConfigError)]
        return torch.tensor([[row[name] for name in self.task.labels] for row in told], dtype=torch.float64)
