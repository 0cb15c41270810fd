"""`lightning.pytorch.Trainer` with an attached model: one callback.

    class Task(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make_model()
            self.tuner = st.attach(self.model, st.id3(budget=103_000, steps=steps), accumulation_steps=4)
        def configure_optimizers(self):
            return torch.optim.AdamW(self.tuner.parameters(), lr=5e-4)

    task = Task()
    trainer = L.Trainer(accumulate_grad_batches=4, callbacks=[SelectuneCallback(task.tuner)])
    trainer.fit(task, loader)                           # later, in a new process: fit(task, loader, ckpt_path=...)

Without `lightning`, the same package under its older name is used, `pytorch_lightning`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

try:
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]
except ImportError:
    from pytorch_lightning import Callback  # pyright: ignore[reportMissingImports]

from selectune.delta import digest_bits
from selectune.errors import CheckpointError, ConfigError
from selectune.frames import methods_of
from selectune.integrations.loading import KeptOut, refuse_other_windows
from selectune.train import Tuner

log = logging.getLogger("selectune")

DELTA_SUFFIX = ".delta.safetensors"
"""The delta of `epoch=3.ckpt` is `epoch=3.delta.safetensors`, beside it."""

_DIGEST = "selectune_digest"  # of a checkpoint's other keys


class SelectuneCallback(Callback):  # pyright: ignore[reportGeneralTypeIssues]
    """Saves the tuner's state in every checkpoint and the delta beside it, resumes from one, logs selected and quota.

    `trainer.fit(..., ckpt_path=)` resumes with a fresh tuner, attached as the first one was to the same base, or with a
    tuner that has stepped, which then goes back. The checkpoint's weights are kept out of the model; the tuner's state
    sets them, and both must agree by bits. Lightning restores batches, optimizers and learning rates. `base` and `full`
    are those of `Tuner.save`. If Lightning removes a checkpoint, its delta is removed too. A checkpoint that is not a
    local file (`s3://...`) gets no delta.

    Raises CheckpointError if the content of a checkpoint changed. Raises ConfigError as fitting or an epoch starts, if
    `accumulate_grad_batches` does not fit the tuner's `accumulation_steps`, if the tuner's model is not part of the
    module, or if the checkpoint has no state or that of another run. Raises BaseMismatchError for another base, and
    IntegrityError, naming tensors, for other weights than those of base and state; the model is then unchanged. Raises
    TunerError for a checkpoint within an accumulation window.
    """

    def __init__(self, tuner: Tuner, base: Mapping[str, Any] | None = None, full: bool = True) -> None:
        self.tuner, self.base, self.full = tuner, base, full
        self._guard: KeptOut | None = None
        self._deltas: dict[Path, Path] = {}  # {checkpoint: its delta} of this process

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Keeps weights out of the attached model until fitting starts."""
        if stage != "fit":
            return
        if not any(module is self.tuner.model for module in pl_module.modules()):
            raise ConfigError(
                f"The model of this tuner is not part of the {type(pl_module).__name__} that is to be fitted. Attach "
                "to the module or to a part of it, and give the callback that tuner."
            )
        self._windows(trainer)
        self._release()
        self._guard = KeptOut(self.tuner)

    def state_dict(self) -> dict[str, Any]:
        return self.tuner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        guard = self._release() or KeptOut(self.tuner)
        guard.release()
        guard.load(state_dict)
        guard.agree("the checkpoint")
        log.info("Resumed from step %d, %d scalars selected.", self.tuner.step, self.tuner.selected)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        guard = self._release()
        if guard is not None and len(guard):
            raise ConfigError(
                f"{len(guard)} tensors were to be loaded into the attached model, and were kept out of it: the "
                "checkpoint has no state of a tuner, since it was made without SelectuneCallback. Resume from another, "
                "or load weights before attach."
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._windows(trainer)  # GradientAccumulationScheduler changes them between epochs

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        tuner = self.tuner
        pl_module.log_dict({"selected": float(tuner.selected), "quota": float(tuner.quota)})

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._forget_removed()
        file = _file_of(trainer)
        if file is not None and trainer.is_global_zero:
            delta = file.with_name(file.stem + DELTA_SUFFIX)
            self.tuner.save(delta, base=self.base, allow_empty=True, full=self.full)
            self._deltas[file] = delta
        checkpoint[_DIGEST] = {"keys": sorted(checkpoint), "sha256": _digest(checkpoint, sorted(checkpoint))}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        told = checkpoint.get(_DIGEST)
        if told is not None and _digest(checkpoint, told["keys"]) != told["sha256"]:
            self._release()
            raise CheckpointError(
                "The checkpoint is damaged: its content does not have the sha256 that it was written with. Resume from "
                "another."
            )

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._forget_removed()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._release()

    def _windows(self, trainer: Any) -> None:
        refuse_other_windows("Lightning", "accumulate_grad_batches", trainer.accumulate_grad_batches, self.tuner)

    def _forget_removed(self) -> None:
        """Removes the deltas of checkpoints that `save_top_k` removed."""
        for checkpoint, delta in list(self._deltas.items()):
            if not checkpoint.exists():
                delta.unlink(missing_ok=True)
                del self._deltas[checkpoint]

    def _release(self) -> KeptOut | None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.release()
        return guard


def _digest(checkpoint: Mapping[str, Any], keys: Iterable[str]) -> str:
    """A sha256 over the tensors and plain values under some keys, because torch.load does not see a flipped bit."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(digest_bits(value.detach().cpu()).encode())
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                found.update(f"{key}=".encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif value is None or isinstance(value, str | int | float | bool):
            found.update(f"{value!r};".encode())

    for key in keys:
        add({key: checkpoint.get(key)})
    return found.hexdigest()


def _file_of(trainer: Any) -> Path | None:
    """The local file that is being saved. Callbacks do not get it, so it is read from the calling Trainer's frame."""
    for name, variables in methods_of(trainer):
        if name == "save_checkpoint":
            path = str(variables.get("filepath"))
            return None if "://" in path else Path(path)
    return None
