"""What a run does between the Trainer's steps: measure, keep the log, tell whoever follows, stop at a broken loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selectune.train import Tuner

if TYPE_CHECKING:
    from selectune.harness.train import Progress


class Follower(TrainerCallback):
    """Keeps `history`: one record for each logged loss and each evaluation, in checkpoints too.

    `keep`: writes the history and more into a checkpoint's folder. `history`: of the run up to its checkpoint.
    """

    def __init__(
        self,
        tuner: Tuner,
        steps: int,
        measure: Callable[[], float],
        eval_every: int | None,
        progress: Progress | None,
        keep: Callable[[Path, int, Sequence[Mapping[str, Any]]], None] | None = None,
        history: list[dict[str, Any]] | None = None,
    ) -> None:
        self.tuner, self.steps, self.measure = tuner, steps, measure
        self.eval_every, self.progress = eval_every, progress
        self.keep = keep
        self.history: list[dict[str, Any]] = history or []
        self.loss: float | None = None
        self.metric: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = int(state.global_step)
        if self.eval_every and step % self.eval_every == 0 and step < self.steps:
            self.metric = self.measure()
            self.history.append({"step": step, "metric": self.metric, "selected": self.tuner.selected})
        if control.should_save:
            control.should_log = True  # else a resumed run's next loss would be the mean over fewer steps
        self._tell(step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keep is not None:
            step = int(state.global_step)
            self.keep(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}", step, self.history)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        kept = ("loss", "grad_norm", "learning_rate", "epoch", "selected", "quota")
        self.history.append({"step": int(state.global_step), **{k: _plain(logs[k]) for k in kept if k in logs}})
        if not math.isfinite(self.loss):
            control.should_training_stop = True
        self._tell(int(state.global_step))

    def _tell(self, step: int) -> None:
        if self.progress is not None:
            from selectune.harness.train import Update

            self.progress.update(
                Update(step, self.steps, self.loss, self.tuner.selected, self.tuner.budget, self.metric)
            )


class AfterStep(TrainerCallback):
    """Calls a function with the step's number after the optimizer's step, while gradients are still there."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self.function = function

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.function(int(state.global_step))


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else float(value)
