"""`transformers.Trainer` with an attached model: no subclass, one small callback.

    tuner = st.attach(model, st.id3(budget=103_000, steps=steps), accumulation_steps=args.gradient_accumulation_steps)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[SelectuneCallback(tuner)])
    trainer.train()

Trainer and trainers made from it (TRL's) see an ordinary model with one trainable parameter. Checkpoints hold the tuned
model as always, and beside it the delta.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selectune.errors import ConfigError
from selectune.train import Tuner

log = logging.getLogger("selectune")

_RESUME = (
    "Resuming from a checkpoint cannot restore the support and its order yet, so the run would not be the one that was "
    "stopped. Start anew without resume_from_checkpoint."
)


class SelectuneCallback(TrainerCallback):
    """Saves the delta in every checkpoint, logs selected, budget and quota, and checks the Trainer's settings.

    `checkpoint-N/delta.safetensors` is the delta after N steps; an early one may be empty. `base`: what a delta records
    of its base, see `Tuner.save`. Costs one checked save (a pass over the weights) a checkpoint.

    Raises ConfigError as training starts, if `gradient_accumulation_steps` is not the tuner's `accumulation_steps`, if
    the Trainer's model is not the tuner's, or if a checkpoint is resumed.
    """

    def __init__(self, tuner: Tuner, base: Mapping[str, Any] | None = None) -> None:
        self.tuner = tuner
        self.base = base
        self._guard: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses a resume before the Trainer loads weights into the attached model."""
        if getattr(args, "resume_from_checkpoint", None):
            raise ConfigError(f"resume_from_checkpoint={args.resume_from_checkpoint!r}: {_RESUME}")
        self._release()
        self._guard = self.tuner.model.register_load_state_dict_pre_hook(_refuse)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._release()
        tuner = self.tuner
        if state.global_step > 0:
            raise ConfigError(f"The Trainer starts at step {state.global_step}: {_RESUME}")
        if args.gradient_accumulation_steps != tuner.accumulation_steps:
            raise ConfigError(
                f"The Trainer makes a step of gradient_accumulation_steps={args.gradient_accumulation_steps} backward "
                f"passes, the tuner was attached with accumulation_steps={tuner.accumulation_steps}. The selection is "
                f"exact over one step's passes, so both must be the same: attach(..., accumulation_steps="
                f"{args.gradient_accumulation_steps})."
            )
        if model is not None and tuner.model not in list(model.modules()):
            raise ConfigError(
                f"The Trainer trains a {type(model).__name__} that is not the model of this tuner. Give the "
                "attached model to the Trainer, and attach anew if it was reloaded (model_init)."
            )
        if tuner.steps is not None and tuner.steps != state.max_steps:
            log.warning(
                "The method was told steps=%d, the Trainer will take %d: %s.",
                tuner.steps,
                state.max_steps,
                "the budget will not be used up" if tuner.steps > state.max_steps else "selection ends before training",
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self.tuner.save(folder, base=self.base, allow_empty=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        tuner = self.tuner
        counts = {"selected": tuner.selected, "budget": tuner.budget, "quota": tuner.quota}
        # The Trainer keeps a copy of the logs that it made before callbacks saw them.
        for record in (logs, state.log_history[-1] if state.log_history else None):
            if record is not None:
                record.update(counts)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._release()

    def _release(self) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None


def _refuse(module: Any, state: Any, prefix: str, *rest: Any) -> None:
    raise ConfigError(f"Weights are loaded into a model with a tuner before its training starts. {_RESUME}")
