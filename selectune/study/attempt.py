"""The process of a cell: `python -m selectune.study.attempt FOLDER` trains it and leaves its results in the folder.

It ends when its standard input does, which is when the process that started it ends. SIGTERM ends the step and writes a
checkpoint; the next attempt goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selectune import plugins, tasks
from selectune.bench.meter import Memory
from selectune.delta import load
from selectune.errors import CheckpointError, ConfigError, SelectuneError, StoppedError
from selectune.files import checkpoints, read_json, write_durably
from selectune.models.evaluate import Evaluation
from selectune.models.restore import Source, evaluate_delta, in_form
from selectune.runs.config import RunConfig
from selectune.runs.folder import run_folder
from selectune.runs.result import RunResult, package_versions
from selectune.runs.stop import Stop
from selectune.runs.training import run
from selectune.study.cells import Cell
from selectune.study.grid import setting_of
from selectune.study.records import ITEMS, Record
from selectune.study.workspace import CELL, DONE
from selectune.tasks import Task

ERROR = "error.json"
"""Why the last attempt failed: `kind`, the class of the error, and `why`."""

STOPPED, REFUSED = 143, 3
"""Exit codes: stopped on request; an error of selectune's own, which the file `ERROR` tells."""

_WITH_ITEMS = ("classification", "choice", "cloze")


def main(folder: Path) -> int:
    told = read_json(folder / CELL, error=ConfigError)
    cell = Cell(told["phase"], told["settings"], tuple(told["measure"]), told["name"], told["title"])
    (folder / ERROR).unlink(missing_ok=True)
    memory = Memory("cpu")
    stop = Stop()
    _listen(stop)
    try:
        check_measured(cell)
        if cell.untuned:
            kind, evaluation, elsewhere, records = _as_it_is(cell, told["key"])
        else:
            found = _trained(cell.config, folder, stop)
            kind, evaluation, elsewhere = found.kind, found.evaluation, _elsewhere(cell, found.delta)
            records = _records(cell, told["key"], found, memory.peak())
    except StoppedError:
        return STOPPED
    except SelectuneError as error:
        why = {"kind": type(error).__name__, "why": str(error)}
        write_durably(folder / ERROR, json.dumps(why).encode())
        return REFUSED
    items = {**_items(kind, evaluation), "measured": {}}
    items["measured"] = {task.name: _items(task.kind.name, there) for task, there in elsewhere}
    write_durably(folder / ITEMS, json.dumps(items).encode())
    records += [_measured(cell.config, records[-1], *each) for each in elsewhere]
    told = {"records": [record.as_json() for record in records]}
    write_durably(folder / DONE, json.dumps(told, allow_nan=False).encode())
    return 0


def check_measured(cell: Cell) -> None:
    """Refuses other tasks that the cell could not be measured on once it is trained: without rows, or of other heads.

    Raises TaskError and ConfigError.
    """
    config = cell.config
    for name in cell.measure:
        task = _named(config)(name)
        trained, there = (
            (of.head.architecture, of.head.num_labels if of.head.labels is None else len(of.head.labels))
            for of in (config.the_task, task)
        )
        if trained != there:
            told = [f"{kind} with {count or 'no'} outputs" for kind, count in (there, trained)]
            raise ConfigError(
                f"What is trained on {config.the_task.name} cannot be measured on {name}, which has another head: "
                f"{told[0]} in place of {told[1]}. Leave it out of measure, or train on a task of its kind."
            )
        with plugins.blame(plugins.source_of(plugins.TASKS, name)):
            tasks.load(task, "validation", config.data)


def _trained(config: RunConfig, folder: Path, stop: Stop) -> RunResult:
    """The run of a cell, from its newest checkpoint if there is a whole one."""
    if checkpoints(folder):
        try:
            with run_folder(folder, resume=True) as owned:
                return run(config, resume=True, stop=stop, folder=owned)
        except (CheckpointError, ConfigError):
            stop.listening = False
    with run_folder(folder, overwrite=True) as owned:
        return run(config, overwrite=True, stop=stop, folder=owned)


def _records(cell: Cell, key: str, found: RunResult, peak: int) -> list[Record]:
    """The evaluations on the way, and the last one, of the saved delta."""
    shared: dict[str, Any] = {
        "cell": key,
        "phase": cell.phase,
        "setting": setting_of(cell),
        "lr": cell.config.learning_rate,
        "seed": cell.config.seed,
        "metric": found.evaluation.metric,
        "lowest": cell.config.the_task.lower_is_better,
        "steps": found.steps,
        "examples": found.evaluation.examples,
    }
    way = [
        Record(**shared, step=row["step"], value=row["metric"], selected=row["selected"], last=False)
        for row in found.history
        if "metric" in row
    ]
    retention = found.evaluation.retention
    more = {
        "trained": found.trained,
        "changed": found.verification.changed,
        "budget": found.budget,
        "seconds": round(found.seconds, 3),
        "peak_bytes": peak,
        "delta_bytes": found.delta_bytes,
        "run": found.run,
        "kind": found.kind,
        "threads": _threads(),
        "versions": package_versions(),
        **({"others": dict(found.evaluation.others)} if found.evaluation.others else {}),
        **({"forgetting": retention.forgetting} if retention is not None else {}),
    }
    last = Record(**shared, step=found.steps, value=found.value, selected=found.selected, last=True, more=more)
    return [*way, last]


def _as_it_is(cell: Cell, key: str) -> tuple[str, Evaluation, list[tuple[Task, Evaluation]], list[Record]]:
    """The base on the cell's task and on others: the kind of task, what was measured, and the record."""
    config, began = cell.config, time.perf_counter()
    task, *others = (_with_examples(config, each) for each in (config.the_task, *map(_named(config), cell.measure)))
    evaluation = _evaluated(config, None, task)
    elsewhere = [(there, _evaluated(config, None, there)) for there in others]
    record = Record(
        key, cell.phase, setting_of(cell), 0.0, config.seed, evaluation.metric, task.lower_is_better, 0, 0,
        evaluation.value, 0, evaluation.examples, last=True,
        more={
            "trained": 0, "changed": 0, "seconds": round(time.perf_counter() - began, 3), "kind": task.kind.name,
            "threads": _threads(), "versions": package_versions(), **_command(config, task.name),
            **({"others": dict(evaluation.others)} if evaluation.others else {}),
        },
    )  # fmt: skip
    return task.kind.name, evaluation, elsewhere, [record]


def _with_examples(config: RunConfig, task: Task) -> Task:
    """The task with the examples in context that are asked for, of its own training rows."""
    if config.shots is None:
        return task
    rows = tasks.load(task, "train", config.data)
    if config.train_size is not None:
        rows = tasks.first_rows(task, rows, config.train_size, config.train_size_seed)
    return tasks.with_shots(task, tasks.first_rows(task, rows, config.shots).examples)


def _command(config: RunConfig, task: str) -> dict[str, str]:
    """The command that measures a base again on a published task, where `selectune eval` can say all of it."""
    if config.task is None or (config.shots and config.train_size) or any("," in word for word in config.words):
        return {}
    names = ("model", "seed", "data", "revision", "dtype", "max_length", "eval_size", "pattern", "shots")
    given = [("task", task), *((name, getattr(config, name)) for name in names)]
    given += [(name, value) for name in ("words", "plugin") for value in getattr(config, name)]
    words = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in given if value is not None]
    return {"command": " ".join(["selectune eval", *words, *["--trust-remote-code"] * config.trust_remote_code])}


def _named(config: RunConfig) -> Callable[[str], Task]:
    """The task of a name, as a cloze where the cell's own is one."""
    if config.pattern is None:
        return plugins.task
    pattern = config.pattern
    return lambda name: tasks.as_cloze(plugins.task(name), pattern, config.words)


def _elsewhere(cell: Cell, delta: Path) -> list[tuple[Task, Evaluation]]:
    """The saved delta on the other tasks that the cell is measured on."""
    there = [in_form(plugins.task(name), load(delta)) for name in cell.measure]
    return [(task, _evaluated(cell.config, delta, task)) for task in there]


def _evaluated(config: RunConfig, delta: Path | None, task: Task) -> Evaluation:
    source = Source(config.model, config.revision, config.dtype, config.trust_remote_code)
    return evaluate_delta(source, delta, task, config.data, config.max_length, config.seed, None, config.eval_size)


def _measured(config: RunConfig, own: Record, task: Task, there: Evaluation) -> Record:
    """The record of another task. It tells no time and no size: those of the run stand at its own task."""
    more = {name: own.more[name] for name in ("trained", "run") if name in own.more}
    more |= {"kind": task.kind.name, **({"others": dict(there.others)} if there.others else {})}
    more |= {} if own.steps else _command(config, task.name)
    setting = dataclasses.replace(own.setting, task=task.name)
    return dataclasses.replace(
        own, setting=setting, metric=there.metric, lowest=task.lower_is_better, value=there.value,
        examples=there.examples, more=more,
    )  # fmt: skip


def _items(kind: str, evaluation: Evaluation) -> dict[str, Any]:
    told = {"predictions": _plain(evaluation.predictions), "answers": _plain(evaluation.answers)}
    scores = None
    if kind in _WITH_ITEMS:
        pairs = zip(told["predictions"], told["answers"], strict=True)
        scores = [float(prediction == answer) for prediction, answer in pairs]
    return {"scores": scores, **told}


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", 0))


def _plain(value: Any) -> Any:
    """A prediction as JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value


def _listen(stop: Stop) -> None:
    def asked(number: int, frame: Any) -> None:
        del frame
        if not stop.listening:
            os._exit(STOPPED)
        stop.ask(number)

    signal.signal(signal.SIGTERM, asked)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the runner sends SIGTERM
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(STOPPED)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
