"""The callback between the Trainer's steps: it measures, keeps the log, reports progress and stops when asked to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from selectune.runs.folder import rotate
from selectune.runs.result import Progress, Update
from selectune.runs.stop import Stop
from selectune.train import Tuner, world


class AskedError(Exception):
    """A measurement was cut short because the run must stop. The checkpoint of its step is complete."""


class RunCallback(TrainerCallback):
    """Keeps `history`, a record for each logged loss and each evaluation; checkpoints hold it too.

    `history`: the records up to the checkpoint. `unmeasured`: True if the checkpoint's step was not measured yet.
    `stop`: when it is asked, this step's checkpoint is written and training ends. `keep`: the number of checkpoints.
    `budgets`: as soon as so many scalars are selected, `reach(budget)` is called and the metric is measured; a record
    of `history` has the budget and the number selected.
    """

    def __init__(
        self,
        tuner: Tuner,
        steps: int,
        measure: Callable[[Callable[[], None]], float],
        eval_every: int | None,
        progress: Progress | None,
        stop: Stop,
        keep: int | None = None,
        history: list[dict[str, Any]] | None = None,
        unmeasured: bool = False,
        budgets: Sequence[int] = (),
        reach: Callable[[int], object] = lambda budget: None,
    ) -> None:
        self.tuner, self.steps, self.measure = tuner, steps, measure
        self.eval_every, self.progress, self.stop, self.keep = eval_every, progress, stop, keep
        self.history: list[dict[str, Any]] = history or []
        self.unmeasured = unmeasured
        passed = {record.get("budget") for record in self.history}
        self.budgets, self.reach = [budget for budget in budgets if budget not in passed], reach
        self.stopped_at: int | None = None
        self.loss: float | None = None
        self.metric: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.save_steps = args.save_steps  # else a resumed run takes them from its checkpoint
        if self.unmeasured:
            self._measure(int(state.global_step))
            if self.unmeasured:
                self.stopped_at = int(state.global_step)
                raise AskedError

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = int(state.global_step)
        reached = [budget for budget in self.budgets if budget <= self.tuner.selected]
        for budget in reached:
            self.reach(budget)
            self.budgets.remove(budget)
            self.history.append({"step": step, "budget": budget, "selected": self.tuner.selected})
        if reached or (self.eval_every and step % self.eval_every == 0 and step < self.steps):
            self._measure(step)
        if world.any_rank(self.stop.asked):
            self.stopped_at = step
            control.should_save = control.should_training_stop = True
        if control.should_save:
            control.should_log = True  # else the next loss of a resumed run would be a mean over fewer steps
        self._tell(step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keep is not None and world.first():
            rotate(Path(args.output_dir), self.keep)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        kept = ("loss", "grad_norm", "learning_rate", "epoch", "selected", "quota")
        self.history.append({"step": int(state.global_step), **{k: _plain(logs[k]) for k in kept if k in logs}})
        if not math.isfinite(self.loss):
            control.should_training_stop = True
        self._tell(int(state.global_step))

    def _measure(self, step: int) -> None:
        """Measures the metric, unless the run must stop: the resumed run then measures first."""
        self.unmeasured = True
        try:
            self.metric = self.measure(self._look)
        except AskedError:
            return
        self.unmeasured = False
        before = [record["step"] < step for record in self.history]  # a resumed run has the loss of this step already
        at = before.index(False) if False in before else len(before)
        self.history.insert(at, {"step": step, "metric": self.metric, "selected": self.tuner.selected})

    def _look(self) -> None:
        if self.stop.asked and world.size() == 1:  # several processes stop together, after a step
            raise AskedError

    def _tell(self, step: int) -> None:
        if self.progress is not None:
            self.progress.update(
                Update(step, self.steps, self.loss, self.tuner.selected, self.tuner.budget, self.metric)
            )


class AfterStep(TrainerCallback):
    """Calls a function with the step's number after the optimizer's step, before gradients are cleared."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self.function = function

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.function(int(state.global_step))


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else float(value)
