"""A run turns a model, a task and a method into delta.safetensors and run.json, by transformers' Trainer."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import selectune as st
from selectune import plugins, tasks
from selectune.adapters import KINDS
from selectune.delta import DELTA_FILE
from selectune.errors import ConfigError, NonFiniteError, StoppedError
from selectune.files import write_durably
from selectune.models.adapted import size_of, virtual_tokens, with_adapter
from selectune.models.bases import device, load_model, longest, quiet
from selectune.models.evaluate import Evaluation, evaluate
from selectune.models.retention import HeldOut, held_out, text_of
from selectune.recipes import RECIPES
from selectune.runs.calibration import calibration
from selectune.runs.config import RunConfig, build_method
from selectune.runs.folder import RUN_FILE, RunFolder, run_folder
from selectune.runs.result import Progress, RunResult, best_of, package_versions
from selectune.runs.resume import (
    ADAPTER_FILE,
    Checkpoint,
    digest_of_rows,
    find,
    load_adapter,
    settings_of,
    write_run,
)
from selectune.runs.stop import Stop
from selectune.train import STATE_FILE, Tuner, Verification, read_state, world, write_state

if TYPE_CHECKING:
    from selectune.runs.progress import RunCallback

log = logging.getLogger("selectune")
Rows = Sequence[dict[str, Any]]
Keep = Callable[[Path, int, "RunCallback"], Mapping[str, Any]]


def run(
    config: RunConfig,
    progress: Progress | None = None,
    resume: bool | str | Path = False,
    overwrite: bool = False,
    stop: Stop | None = None,
    folder: RunFolder | None = None,
) -> RunResult:
    """Trains, saves `out`/delta.safetensors and `out`/run.json, and measures the saved delta.

    The same config gives the same delta, byte for byte, on the same machine, thread count and versions (on a CPU).
    `resume`: a checkpoint, or True for the newest whole one in `out`. The delta then has the bytes of a run without a
    stop. Only what no bit of it depends on may differ: where files lie, and what is measured, kept and reported.
    Under torchrun or accelerate launch, `batch_size` is that of each process, and the first process writes.
    `overwrite`: replace a run that is in `out`. `stop`: when it is asked, the run ends after its step, with a
    checkpoint. `folder`: `out`, if the caller owns it already (`run_folder`).

    Raises RunFolderError at once if `out` is another run's. Raises ModelError, TaskError, ConfigError before training,
    the last one before anything is loaded if a checkpoint is missing or of another run, and CheckpointError if it is
    not whole. Raises StoppedError if the run was stopped, NonFiniteError if the loss is not finite, and
    NothingTrainedError if no scalar moved; then no delta is written.
    """
    if config.out is None:
        raise ConfigError("out is missing: the folder that the delta is written to.")
    if resume is True and overwrite:
        raise ConfigError("resume goes on with the run in out and overwrite removes it: give one of the two.")
    world.join()
    owned = run_folder(config.out, resume is not False, overwrite) if folder is None else nullcontext(folder)
    stop = stop or Stop()
    with owned as folder:
        try:
            return _Run(config, progress, None if resume is False else find(config, resume), folder, stop).result()
        finally:
            stop.listening = False


class _Run:
    """One run: its settings, and the model, task, rows and tuner that it works on."""

    def __init__(
        self, config: RunConfig, progress: Progress | None, checkpoint: Checkpoint | None, folder: RunFolder, stop: Stop
    ) -> None:
        self.began = time.perf_counter()
        self.config, self.progress, self.checkpoint = config, progress, checkpoint
        self.folder, self.stop = folder, stop
        self.task = config.the_task
        with plugins.blame(plugins.source_of(plugins.TASKS, self.task.name)):
            splits = tasks.splits_of(self.task, config.data, None if config.train is not None else config.hold_out)
        if config.train_size is not None:
            splits["train"] = tasks.first_rows(self.task, splits["train"], config.train_size, config.train_size_seed)
        if config.shots is not None:
            self.task = tasks.with_shots(self.task, tasks.first_rows(self.task, splits["train"], config.shots).examples)
        if config.soft_labels is not None:
            self.task = tasks.with_soft_labels(self.task)
            splits["train"] = tasks.read_soft(self.task, config.soft_labels)
        self.learned_from = splits["train"].digest
        self.measured_on = splits["validation"].digest
        splits["validation"] = tasks.some_rows(self.task, splits["validation"], config.eval_size)
        self.origins = {name: f"{split.origin} ({len(split):,} rows)" for name, split in splits.items()}
        text = None if config.retain is None else text_of(config.retain, config.data)
        self.held_out: HeldOut | None = None
        loaded = load_model(
            config.model, self.task.head, config.seed, config.revision, config.dtype, config.trust_remote_code,
            quantised=config.quantise,
        )  # fmt: skip
        self.task.fits(loaded.model)
        if text is not None:
            options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
            self.held_out = held_out(*text, loaded, config.model, **options)
            self.before = self.held_out.loss(loaded.model)
        taken = virtual_tokens(config.adapter)
        self.max_length = longest(loaded.model, loaded.tokenizer, config.max_length, self.task.max_length, taken)
        self.rows = {
            name: self.task.encode(loaded.tokenizer, split.examples, self.max_length) for name, split in splits.items()
        }
        self.steps = config.steps(len(self.rows["train"]), world.size())
        named = config.adapter_for_size
        texts = min(2, len(self.task.fields))
        size = None if named is None else size_of(loaded, named, config.seed, texts)
        if config.adapter is not None:
            steps = self.steps if config.on is None else None
            freeze = config.on is None or not RECIPES[config.recipe].beside
            loaded = with_adapter(loaded, config.adapter, config.seed, steps, texts, freeze)
        self.loaded = loaded
        if checkpoint is not None:
            folder.id = checkpoint.run
        self.keep = self._keeper()
        self.base = loaded.base(full=True)
        loaded.model.to(device())
        self.tuner = self._attach(size)
        if config.checkpoint_budgets and config.checkpoint_budgets[-1] > self.tuner.budget:
            raise ConfigError(
                f"checkpoint_budgets={config.checkpoint_budgets[-1]:,} is never reached: {self.tuner.budget:,} scalars "
                "are selected in all."
            )
        folder.check_space(self._space())

    def result(self) -> RunResult:
        """Trains, saves and measures."""
        config, tuner, stop, checkpoint = self.config, self.tuner, self.stop, self.checkpoint
        history = self._train()
        delta, verification = self._save()
        counts = {"selected": tuner.selected, "budget": tuner.budget, "trained": tuner.trained}
        events, taken = dict(tuner.events), tuner.step
        tuner.detach()
        stop.listening = False
        stop.where = f"after its last step: {delta} is whole; it was not measured, which `selectune eval` does"
        if stop.asked:
            raise StoppedError(f"{stop.where}.", taken, stop.signal or 0)
        with st.load(delta).applied(self.loaded.model):
            evaluation = self._measure()
            if self.held_out is not None:
                after = self.held_out.loss(self.loaded.model)
                evaluation = replace(evaluation, retention=self.held_out.retention(self.before, after))
        result = RunResult(
            evaluation=evaluation,
            best=best_of(history, taken, counts["selected"], evaluation.value, self.task.lower_is_better),
            steps=taken,
            **counts,
            verification=verification,
            delta=delta,
            delta_bytes=delta.stat().st_size,
            seconds=time.perf_counter() - self.began + (0.0 if checkpoint is None else checkpoint.seconds),
            events=events,
            history=history,
            model={key: self.base[key] for key in ("id", "revision", "seed", "initialised")},
            origins=self.origins,
            max_length=self.max_length,
            config=config,
            kind=self.task.kind.name,
            run=self.folder.id,
            resumed=None if checkpoint is None else checkpoint.step,
        )
        text = json.dumps({**result.as_json(), "history": list(history)}, indent=2, allow_nan=False)
        if world.first():
            write_durably(self.folder.path / RUN_FILE, text.encode())
        stop.where = "after its end: all of it is written"
        return result

    def _measure(self, look: Callable[[], None] | None = None) -> Evaluation:
        return evaluate(self.loaded.model, self.loaded.tokenizer, self.task, self.rows["validation"], look)

    def _collate(self, rows: Rows) -> dict[str, torch.Tensor]:
        return self.task.kind.collate(self.loaded.tokenizer, rows)

    def _space(self) -> int:
        """The bytes that a run may write: two deltas, and its checkpoints at 60 bytes a scalar."""
        config, trained = self.config, self.tuner.trained
        parameters = self.tuner.model.parameters() if config.full_checkpoints else ()
        checkpoint = 60 * trained + (1 << 16) + sum(p.nbytes for p in parameters)
        kept = 0 if config.save_every is None else config.keep or 1
        return (2 + len(config.checkpoint_budgets)) * (8 * trained + (1 << 16)) + kept * checkpoint

    def _attach(self, size: int | None) -> Tuner:
        config, model, rows = self.config, self.loaded.model, self.rows["train"]
        method = build_method(config, self.steps, size)
        own = getattr(self.task.kind, "loss", None)
        read = calibration(model, method.score, rows, self._collate, config.batch_size, config.seed, own)
        if read and self.checkpoint is not None and self.checkpoint.settings["batch_size"] != config.batch_size:
            raise ConfigError(
                f"{method.name} reads calibration data in batches of batch_size, which was "
                f"{self.checkpoint.settings['batch_size']} in {self.checkpoint.folder} and is {config.batch_size} now. "
                "Resume with as many processes as wrote it."
            )
        return st.attach(model, method, seed=config.seed, accumulation_steps=config.accumulation, **read)

    def _train(self) -> list[dict[str, Any]]:
        """Trains, and returns the log: losses, and the metric where it was measured on the way."""
        config, checkpoint, adapted, stop = self.config, self.checkpoint, self.loaded.adapted, self.stop
        history = [] if checkpoint is None else [dict(record) for record in checkpoint.history]
        if checkpoint is not None:
            load_adapter(checkpoint, adapted)
        if checkpoint is not None and checkpoint.step >= self.steps:  # the Trainer would take one more step
            stop.listening = True
            self.folder.begin(checkpoint.folder)
            self.tuner.load_state_dict(read_state(checkpoint.folder / STATE_FILE))
            return history
        from selectune.integrations.transformers import SelectuneCallback
        from selectune.runs.progress import AfterStep, AskedError, RunCallback
        from selectune.runs.trainer import RowDataset, RunTrainer, arguments_of, optimizer_of

        follower = RunCallback(
            self.tuner, self.steps, lambda look: self._measure(look).value, config.eval_every or self.task.eval_every,
            self.progress, stop, config.keep, history, checkpoint is not None and checkpoint.unmeasured,
            config.checkpoint_budgets, lambda budget: self._save(Path(f"budget-{budget}"), allow_empty=True),
        )  # fmt: skip
        after = None if adapted is None else adapted.after_step
        keeper = SelectuneCallback(self.tuner, self.base, keep=lambda folder, step: self.keep(folder, step, follower))
        with quiet():
            trainer = RunTrainer(
                full=config.full_checkpoints,
                model=self.loaded.model,
                args=arguments_of(config, self.steps),
                train_dataset=RowDataset(self.rows["train"]),
                data_collator=self._collate,
                compute_loss_func=getattr(self.task.kind, "loss", None),
                callbacks=[keeper, follower, *([] if after is None else [AfterStep(after)])],
                optimizers=(optimizer_of(config, self.loaded, self.tuner), None),
            )
            if self.progress is not None:
                self.progress.start(f"{config.method} on {self.task.name}", self.steps)
            stop.listening = True  # until the delta is saved
            self.folder.begin(None if checkpoint is None else checkpoint.folder)
            try:
                with suppress(AskedError):
                    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
            finally:
                if self.progress is not None:
                    self.progress.stop()
        if (step := follower.stopped_at) is not None:
            raise StoppedError(
                f"after step {step:,} of {self.steps:,}, as asked. {Path(str(config.out)) / f'checkpoint-{step}'} has "
                "all of it, and the same run with resume=True goes on from there (command line: --resume, and neither "
                "--overwrite nor --resume-from).",
                step,
                stop.signal or 0,
            )
        for record in follower.history:
            if not math.isfinite(record.get("loss", 0.0)):
                raise NonFiniteError(
                    f"The training loss is {record['loss']} at step {record['step']} of {self.steps}, so the run was "
                    "stopped and no delta was saved. A lower learning rate than "
                    f"{config.learning_rate:g} or float32 weights may help."
                )
        return follower.history

    def _keeper(self) -> Keep:
        """The function that writes a checkpoint's record of the run, beside the files of the Trainer and the tuner."""
        rows, checkpoint, adapted = self.rows["train"], self.checkpoint, self.loaded.adapted
        digest, before = digest_of_rows(rows), 0.0
        settings, now = settings_of(self.config), {**package_versions(), "threads": str(torch.get_num_threads())}
        if checkpoint is not None:
            before = checkpoint.seconds
            if checkpoint.rows != digest:
                raise ConfigError(
                    f"The checkpoint {checkpoint.folder} is of a run over other training data: the {len(rows):,} rows "
                    "found now, as the model reads them, are not the same."
                )
            old = checkpoint.versions
            other = [f"{name} {old[name]}, now {now.get(name)}" for name in old if old[name] != now.get(name)]
            if other:
                log.warning(
                    "The run began under other versions, so its bits may differ from here on: %s.", ", ".join(other)
                )

        def keep(folder: Path, step: int, follower: RunCallback) -> Mapping[str, Any]:
            if adapted is not None and adapted.kept is not None:
                write_state(folder / ADAPTER_FILE, adapted.kept.state_dict())
            seconds = before + time.perf_counter() - self.began
            told = {"settings": settings, "rows": digest, "seconds": seconds, "versions": now}
            seen = {"unmeasured": follower.unmeasured, "history": list(follower.history)}
            write_run(folder, {"step": step, **told, **seen})
            return {"run": self.folder.id, "step": step}

        return keep

    def _save(self, below: Path = Path(), **more: bool) -> tuple[Path, Verification]:
        """Writes the delta with the task and the length, from which `eval` rebuilds the head and the batches."""
        config = self.config
        method: dict[str, Any] = {"task": self.task.name, "max_length": self.max_length}
        if config.train is not None:
            kind = self.task.kind.name if config.pattern is None else "classification"
            method["rows"] = config.own.as_json(kind, self.measured_on)
        if config.pattern is not None:
            words, labels = list(config.words), list(self.task.labels)
            method["cloze"] = {"pattern": config.pattern, "words": words, "labels": labels}
            if isinstance(self.task.kind, tasks.Cloze) and self.task.kind.context:
                method["cloze"]["context"] = self.task.kind.context
        if config.soft_labels is not None:
            method["soft_labels"] = self.learned_from
        info: dict[str, dict[str, Any]] = {"method": method}
        if config.dtype is not None:
            method["dtype"] = config.dtype
        if config.quantise is not None:
            method["quantise"] = config.quantise
        if config.adapter is not None and KINDS[config.adapter.kind].peft:
            info["versions"] = {"peft": metadata.version("peft")}
        verification = self.tuner.verify()
        path = Path(str(config.out)) / below / DELTA_FILE
        if world.first():
            self.tuner.save(path, base=self.base, info=info, **more)
        world.wait()
        return path, verification
