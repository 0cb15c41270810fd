"""Your own loop over `accelerate.Accelerator`: its checkpoints hold the tuner and restore it exactly.

tuner = st.attach(model, st.id3(budget=103_000, steps=steps), accumulation_steps=4)
optimizer = torch.optim.AdamW(tuner.parameters(), lr=5e-4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
register(accelerator, tuner)
...
accelerator.save_state("runs/step-100")             # later, in a new process: accelerator.load_state(...)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from selectune.errors import ConfigError
from selectune.files import seal, verify
from selectune.integrations.loading import KeptOut, refuse_deepspeed, refuse_other_windows
from selectune.train import STATE_FILE, Tuner, read_state, write_state

log = logging.getLogger("selectune")


class Registration:
    """The hooks that `register` put on an Accelerator; `remove` takes them off."""

    def __init__(self, accelerator: Any, tuner: Tuner, base: Mapping[str, Any] | None, full: bool) -> None:
        self.accelerator, self.tuner, self.base, self.full = accelerator, tuner, base, full
        self._guard: KeptOut | None = None
        self._handles = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]
        self._save_state = accelerator.save_state
        accelerator.save_state = self._save_and_seal

    def remove(self) -> None:
        """Takes the tuner out of `save_state` and `load_state`."""
        for handle in self._handles:
            handle.remove()
        self.accelerator.save_state = self._save_state
        self._release()

    def _save_and_seal(self, *args: Any, **kwargs: Any) -> Any:
        folder = self._save_state(*args, **kwargs)
        self.accelerator.wait_for_everyone()  # every process writes its random state, which the manifest names
        if self.accelerator.is_main_process:
            seal(folder, {"step": self.tuner.step})
        return folder

    def _save(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        del weights
        self._prepared(models, "saved")
        state = self.tuner.state_dict()
        if self.accelerator.is_main_process:
            self.tuner.save(folder, base=self.base, allow_empty=True, full=self.full)
            write_state(Path(folder) / STATE_FILE, state)

    def _load(self, models: list[nn.Module], folder: str) -> None:
        """Loads the tuner's state first. The accelerator's weights are then compared with it, and not written."""
        self._prepared(models, "loaded")
        self._release()
        file = Path(folder) / STATE_FILE
        if not file.is_file():
            raise ConfigError(
                f"{folder} has no {STATE_FILE}, so the support and its order cannot be restored: it was saved before "
                "register(accelerator, tuner). Load another folder, or start anew."
            )
        verify(folder)
        saved = read_state(file)

        def then() -> None:
            guard = self._release()
            if guard is not None:
                guard.agree(folder)
            log.info("Resumed from %s: step %d, %d scalars selected.", folder, self.tuner.step, self.tuner.selected)

        guard = KeptOut(self.tuner, then)
        try:
            guard.load(saved)
        except BaseException:
            guard.release()
            raise
        self._guard = guard

    def _release(self) -> KeptOut | None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.release()
        return guard

    def _prepared(self, models: list[nn.Module], what: str) -> None:
        model = self.tuner.model
        if not any(model is part for outer in models for part in outer.modules()):
            raise ConfigError(
                f"The model of this tuner is not among the {len(models)} that the accelerator prepared, so its weights "
                f"would not be {what}. Give the attached model to accelerator.prepare, and attach anew where a model "
                "is made anew."
            )


def register(accelerator: Any, tuner: Tuner, base: Mapping[str, Any] | None = None, full: bool = True) -> Registration:
    """Makes `save_state` write the tuner's state and its delta, and `load_state` read the state before any weights.

    The files `tuner.safetensors` and `delta.safetensors` are written beside accelerate's own; `base` and `full` are
    those of `Tuner.save`. `manifest.json` is written last and names all files with their sha256: `load_state` takes
    only a whole folder. The tuner may be a fresh one, attached in the same way to the same base, or one that has
    stepped, which then goes back. The folder's weights are compared by bits, and not loaded. Call `register` after
    `accelerator.prepare`, in the process that saves and in the one that loads. Several processes call all of it
    together, and the first one writes.

    Raises ConfigError if the tuner's model was not prepared by this accelerator, if `gradient_accumulation_steps` is
    above 1 and not the tuner's `accumulation_steps`, if the model is sharded, or under DeepSpeed. `save_state` raises
    TunerError within an accumulation window; `load_state` raises ConfigError for a folder without a state or with one
    of another run, CheckpointError for one that is incomplete or damaged, BaseMismatchError for another base, and
    IntegrityError, naming tensors, for weights that are not those of base and state. What is refused has changed
    nothing.
    """
    passes = accelerator.gradient_accumulation_steps
    refuse_deepspeed("The accelerator", accelerator.distributed_type == "DEEPSPEED")
    if tuner.sharded:
        raise ConfigError(
            "accelerate loads sharded weights before anything else, and a tuner's state must come before its weights. "
            "Leave register, save_state and load_state out: keep tuner.state_dict() (selectune.train.write_state) and "
            "optimizer.state_dict(), which are whole in every process and hold all that was trained."
        )
    if passes > 1:
        refuse_other_windows("The accelerator", "gradient_accumulation_steps", passes, tuner)
    registration = Registration(accelerator, tuner, base, full)
    registration._prepared(accelerator._models, "saved")
    return registration
