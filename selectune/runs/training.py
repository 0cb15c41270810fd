"""A run: a model, a task and a method become delta.safetensors and run.json. The loop is transformers' Trainer."""

from __future__ import annotations

import json
import logging
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

import selectune as st
from selectune import plugins, tasks
from selectune.adapters import KINDS
from selectune.delta import DELTA_FILE, versions
from selectune.errors import ConfigError, NonFiniteError, StoppedError
from selectune.files import write_durably
from selectune.models.adapted import size_of, virtual_tokens, with_module
from selectune.models.bases import LoadedModel, device, load_model, longest, quiet
from selectune.models.evaluate import Evaluation, collate, encode, evaluate
from selectune.runs.calibration import calibration
from selectune.runs.config import RunConfig, build_method
from selectune.runs.folder import RUN_FILE, RunFolder, run_folder
from selectune.runs.resume import (
    MODULE_FILE,
    Checkpoint,
    digest_of_rows,
    find,
    load_module,
    settings_of,
    write_run,
)
from selectune.runs.stop import Stop
from selectune.tasks import Split, Task
from selectune.train import STATE_FILE, Tuner, Verification, read_state, write_state

if TYPE_CHECKING:
    from selectune.runs.progress import RunCallback

log = logging.getLogger("selectune")
Rows = Sequence[dict[str, Any]]
Keep = Callable[[Path, int, "RunCallback"], Mapping[str, Any]]


@dataclass(frozen=True)
class Update:
    """Where a run is; what a progress bar shows."""

    step: int
    steps: int
    loss: float | None
    selected: int
    budget: int
    metric: float | None


class Progress(Protocol):
    """Whoever wants to follow a run."""

    def start(self, title: str, steps: int) -> None: ...
    def update(self, update: Update) -> None: ...
    def stop(self) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `value` is the metric of the saved delta, read back and applied to the bare base."""

    evaluation: Evaluation
    best: Mapping[str, Any] | None  # the best evaluation on the way: step, value, selected
    steps: int
    selected: int
    budget: int
    trained: int
    verification: Verification
    delta: Path
    delta_bytes: int
    seconds: float
    events: Mapping[str, int]
    history: Sequence[Mapping[str, Any]]
    model: Mapping[str, Any]
    origins: Mapping[str, str]
    max_length: int
    config: RunConfig
    run: str  # its id, which a resumed run keeps
    resumed: int | None = None  # the step of the checkpoint that it went on from

    @property
    def value(self) -> float:
        return self.evaluation.value

    def as_json(self) -> dict[str, Any]:
        """The result as `train --json` prints it and run.json keeps it."""
        return {
            **self.evaluation.as_json(),
            "method": self.config.method,
            "best": None if self.best is None else dict(self.best),
            "steps": self.steps,
            "selected": self.selected,
            "budget": self.budget,
            "trained": self.trained,
            "changed": self.verification.changed,
            "delta": str(self.delta),
            "delta_bytes": self.delta_bytes,
            "seconds": round(self.seconds, 3),
            "run": self.run,
            "resumed": self.resumed,
            "max_length": self.max_length,
            "events": dict(self.events),
            "model": dict(self.model),
            "data": dict(self.origins),
            "config": self.config.as_json(),
            "plugins": plugins.used(self.config.recipe, self.config.task),
            "versions": _versions(),
        }


def run(
    config: RunConfig,
    progress: Progress | None = None,
    resume: bool | str | Path = False,
    overwrite: bool = False,
    stop: Stop | None = None,
    folder: RunFolder | None = None,
) -> RunResult:
    """Trains, saves `out`/delta.safetensors and `out`/run.json, and measures what was saved.

    The same config gives the same delta, byte for byte, on the same machine, thread count and versions (on a CPU).
    `resume`: a checkpoint, or True for the newest whole one in `out`; the delta is the same bytes as without a stop.
    Only `out`, `data`, `eval_every`, `save_every`, `keep`, `full_checkpoints` and `report_to` may differ. `overwrite`:
    a run that is in `out` may go. `stop`: asked, it ends the run after its step, with a checkpoint. `folder`: `out`, if
    the caller owns it already (`run_folder`).

    Raises RunFolderError at once where `out` is another run's; ModelError, TaskError, ConfigError before training, the
    last before anything is loaded for a checkpoint that is missing or of another run, and CheckpointError for one that
    is not whole; StoppedError if it was stopped; NonFiniteError if the loss is not finite and NothingTrainedError if no
    scalar moved, and then no delta is written.
    """
    if config.out is None:
        raise ConfigError("out is missing: the folder that the delta is written to.")
    if resume is True and overwrite:
        raise ConfigError("resume goes on with the run in out and overwrite removes it: give one of the two.")
    owned = run_folder(config.out, resume is not False, overwrite) if folder is None else nullcontext(folder)
    stop = stop or Stop()
    with owned as folder:
        try:
            return _run(config, progress, None if resume is False else find(config, resume), folder, stop)
        finally:
            stop.listening = False


def _run(
    config: RunConfig, progress: Progress | None, checkpoint: Checkpoint | None, folder: RunFolder, stop: Stop
) -> RunResult:
    began = time.perf_counter()
    task = tasks.get(config.task)
    with plugins.blame(plugins.source_of(plugins.TASKS, task.name)):
        splits = {name: tasks.load(task, name, config.data) for name in ("train", "validation")}
    loaded = load_model(config.model, task, config.seed, config.revision, config.dtype, config.trust_remote_code)
    taken = virtual_tokens(config.module)
    max_length = longest(loaded.model, loaded.tokenizer, config.max_length, task.max_length, taken)
    rows = {name: encode(loaded.tokenizer, split.examples, max_length) for name, split in splits.items()}
    steps = config.steps(len(rows["train"]))
    size = None if config.module_for_size is None else size_of(loaded, config.module_for_size, config.seed)
    if config.module is not None:
        loaded = with_module(loaded, config.module, config.seed, steps if config.on is None else None)
    if checkpoint is not None:
        folder.id = checkpoint.run
    keep = _keep(config, loaded, checkpoint, rows["train"], began, folder.id)
    base = loaded.base(full=True)
    loaded.model.to(device())
    tuner = _attach(config, loaded, rows["train"], steps, size)
    folder.check_space(_space(config, tuner))
    history = _train(config, loaded, tuner, task, rows, steps, base, progress, keep, checkpoint, stop, folder)
    delta, verification = _save(config, tuner, base, max_length)
    counts = {"selected": tuner.selected, "budget": tuner.budget, "trained": tuner.trained}
    events, taken = dict(tuner.events), tuner.step
    tuner.detach()
    stop.listening = False
    stop.where = f"after its last step: {delta} is whole; it was not measured, which `selectune eval` does"
    if stop.asked:
        raise StoppedError(f"{stop.where}.", taken, stop.signal or 0)
    with st.load(delta).applied(loaded.model):
        evaluation = evaluate(loaded.model, loaded.tokenizer, task, rows["validation"])
    result = RunResult(
        evaluation=evaluation,
        best=_best(history, taken, counts["selected"], evaluation.value),
        steps=taken,
        **counts,
        verification=verification,
        delta=delta,
        delta_bytes=delta.stat().st_size,
        seconds=time.perf_counter() - began + (0.0 if checkpoint is None else checkpoint.seconds),
        events=events,
        history=history,
        model={k: base[k] for k in ("id", "revision", "seed", "initialised")},
        origins=_origins(splits),
        max_length=max_length,
        config=config,
        run=folder.id,
        resumed=None if checkpoint is None else checkpoint.step,
    )
    text = json.dumps({**result.as_json(), "history": list(history)}, indent=2, allow_nan=False)
    write_durably(folder.path / RUN_FILE, text.encode())
    stop.where = "after its end: all of it is written"
    return result


def _space(config: RunConfig, tuner: Tuner) -> int:
    """Bytes that a run may write: two deltas, and the checkpoints that are there at once, at 60 bytes a scalar."""
    delta = 8 * tuner.trained + (1 << 16)
    model = sum(p.numel() * p.element_size() for p in tuner.model.parameters()) if config.full_checkpoints else 0
    return 2 * delta + (config.keep or 1) * (60 * tuner.trained + (1 << 16) + model) * (config.save_every is not None)


def _attach(config: RunConfig, loaded: LoadedModel, rows: Rows, steps: int, size: int | None) -> Tuner:
    method = build_method(config, steps, size)
    model, seed = loaded.model, config.seed
    read = calibration(model, method.score, rows, lambda some: collate(loaded.tokenizer, some), config.batch_size, seed)
    return st.attach(model, method, seed=seed, accumulation_steps=config.accumulation, **read)


def _train(
    config: RunConfig,
    loaded: LoadedModel,
    tuner: Tuner,
    task: Task,
    rows: Mapping[str, Rows],
    steps: int,
    base: Mapping[str, Any],
    progress: Progress | None,
    keep: Keep,
    checkpoint: Checkpoint | None,
    stop: Stop,
    folder: RunFolder,
) -> list[dict[str, Any]]:
    """Trains for `steps` steps; returns the log: losses, and the metric where it was asked for on the way."""
    history = [] if checkpoint is None else [dict(record) for record in checkpoint.history]
    if checkpoint is not None:
        load_module(checkpoint, loaded.adapted)
    if checkpoint is not None and checkpoint.step >= steps:  # the Trainer would take a step more
        stop.listening = True
        folder.begin(checkpoint.folder)
        tuner.load_state_dict(read_state(checkpoint.folder / STATE_FILE))
        return history
    from selectune.integrations.transformers import SelectuneCallback
    from selectune.runs.progress import AfterStep, AskedError, RunCallback
    from selectune.runs.trainer import RowDataset, RunTrainer, arguments_of, optimizer_of

    def measure(look: Callable[[], None]) -> float:
        return evaluate(loaded.model, loaded.tokenizer, task, rows["validation"], look).value

    every, unmeasured = config.eval_every or task.eval_every, checkpoint is not None and checkpoint.unmeasured
    follower = RunCallback(tuner, steps, measure, every, progress, stop, config.keep, history, unmeasured)
    after = None if loaded.adapted is None else loaded.adapted.after_step
    with quiet():
        trainer = RunTrainer(
            full=config.full_checkpoints,
            model=loaded.model,
            args=arguments_of(config, steps),
            train_dataset=RowDataset(rows["train"]),
            data_collator=lambda batch: collate(loaded.tokenizer, batch),
            callbacks=[
                SelectuneCallback(tuner, base, keep=lambda folder, step: keep(folder, step, follower)),
                follower,
                *([] if after is None else [AfterStep(after)]),
            ],
            optimizers=(optimizer_of(config, loaded, tuner), None),
        )
        if progress is not None:
            progress.start(f"{config.method} on {task.name}", steps)
        stop.listening = True  # until the delta is saved
        folder.begin(None if checkpoint is None else checkpoint.folder)
        try:
            with suppress(AskedError):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
        finally:
            if progress is not None:
                progress.stop()
    if follower.stopped_at is not None:
        step = follower.stopped_at
        raise StoppedError(
            f"after step {step:,} of {steps:,}, as asked. {Path(str(config.out)) / f'checkpoint-{step}'} has "
            "all of it, and the same run with resume=True goes on from there (command line: --resume, and neither "
            "--overwrite nor --resume-from).",
            step,
            stop.signal or 0,
        )
    for record in follower.history:
        loss = record.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise NonFiniteError(
                f"The training loss is {loss} at step {record['step']} of {steps}, so the run was stopped and no delta "
                f"was saved. A lower learning rate than {config.learning_rate:g} or float32 weights may help."
            )
    return follower.history


def _keep(
    config: RunConfig, loaded: LoadedModel, checkpoint: Checkpoint | None, rows: Rows, began: float, run: str
) -> Keep:
    """Writes what a checkpoint keeps of a run beside the Trainer's and the tuner's files."""
    digest, before = digest_of_rows(rows), 0.0
    settings, now = settings_of(config), {**_versions(), "threads": str(torch.get_num_threads())}
    if checkpoint is not None:
        before = checkpoint.seconds
        if checkpoint.rows != digest:
            raise ConfigError(
                f"The checkpoint {checkpoint.folder} is of a run over other training data: the {len(rows):,} rows "
                "found now, as the model reads them, are not the same."
            )
        other = [
            f"{name} {old}, now {now.get(name)}" for name, old in checkpoint.versions.items() if old != now.get(name)
        ]
        if other:
            log.warning("The run began under other versions; its bits may differ from here on: %s.", ", ".join(other))

    def keep(folder: Path, step: int, follower: RunCallback) -> Mapping[str, Any]:
        ranks = None if loaded.adapted is None else loaded.adapted.ranks
        if ranks is not None:
            write_state(folder / MODULE_FILE, ranks.state_dict())
        told = {"settings": settings, "rows": digest, "seconds": before + time.perf_counter() - began, "versions": now}
        seen = {"unmeasured": follower.unmeasured, "history": list(follower.history)}
        write_run(folder, {"step": step, **told, **seen})
        return {"run": run, "step": step}

    return keep


def _save(config: RunConfig, tuner: Tuner, base: Mapping[str, Any], max_length: int) -> tuple[Path, Verification]:
    """Writes the delta, with what `eval` needs to rebuild the task's head and the same batches."""
    method = {"task": config.task, "max_length": max_length}
    info: dict[str, dict[str, Any]] = {"method": method}
    if config.dtype is not None:
        method["dtype"] = config.dtype
    if config.module is not None and KINDS[config.module.kind].peft:
        info["versions"] = {"peft": metadata.version("peft")}
    verification = tuner.verify()
    return tuner.save(Path(str(config.out)) / DELTA_FILE, base=base, info=info), verification


def _best(history: Sequence[Mapping[str, Any]], step: int, selected: int, value: float) -> Mapping[str, Any] | None:
    """The best evaluation of the run, the last one included, as the papers report it; None if there was one only."""
    seen = [record for record in history if "metric" in record]
    if not seen:
        return None
    points = [{"step": r["step"], "value": r["metric"], "selected": r["selected"]} for r in seen]
    return max([*points, {"step": step, "value": value, "selected": selected}], key=lambda point: point["value"])


def _origins(splits: Mapping[str, Split]) -> dict[str, str]:
    return {name: f"{split.origin} ({len(split):,} rows)" for name, split in splits.items()}


def _versions() -> dict[str, str]:
    found = {**versions(), "python": platform.python_version()}
    for package in ("transformers", "accelerate", "datasets", "peft"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


__all__ = ["RUN_FILE", "Progress", "RunConfig", "RunResult", "Update", "run"]
