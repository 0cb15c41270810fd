"""Every error a user can meet, in one tree.

SelectuneError
├── ConfigError              a value of a recipe, an axis or a command is not allowed   (also ValueError)
│   ├── BudgetError          a budget of 0, beyond the model, or neither count nor density
│   ├── RunFolderError       a folder that another run owns, or holds one
│   ├── ScheduleError        a method without its steps, or with steps it cannot use
│   └── ScopeError           patterns that match nothing, tensors that cannot be trained in place
├── TunerError               attach, train, detach                                      (also RuntimeError)
│   ├── AlreadyAttachedError the model carries a tuner already
│   ├── DetachedError        the tuner was taken off the model
│   ├── OptimizerError       an optimizer over the frozen weights, or one whose state is of another step
│   ├── AccumulationError    more backward passes in a step than `accumulation_steps` said
│   ├── CalibrationError     a method that needs examples got none, or unusable ones
│   ├── IntegrityError       a weight outside the support is not the base's any more
│   └── NothingTrainedError  nothing was selected, or nothing moved
├── DeltaError               files and deltas                                           (also RuntimeError)
│   ├── DeltaFormatError     a file that is not a delta, is damaged, or is of a later version
│   ├── CheckpointError      a checkpoint that is incomplete or damaged
│   ├── BaseMismatchError    the model is not the base this delta was made on
│   ├── DeltaStateError      applied twice, reverted out of order, applied under a tuner
│   │   └── DeltaTimeoutError other threads used the model for longer than the timeout      (also TimeoutError)
│   └── NonFiniteError       NaN or infinity among the trained values
├── ModelError               a model that cannot be found or loaded
├── PluginError              a plug-in that raised, or offers something that cannot be taken
├── StoppedError             a run was asked to stop, and did; a checkpoint holds it
└── TaskError                a task, split or data file that cannot be found or read
    └── UnknownTaskError     a name that is no task's                               (also ConfigError)

A message says what was asked, why it cannot be, what was received and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SelectuneError(Exception):
    """Base of every error that selectune raises on purpose."""


class ConfigError(SelectuneError, ValueError):
    """A value of a recipe, an axis or a command is not allowed."""


class BudgetError(ConfigError):
    """The budget is 0, beyond the model, or neither a count nor a density."""


class RunFolderError(ConfigError):
    """The folder of a run belongs to another run: one that is going on, or one whose files would be overwritten."""


class ScheduleError(ConfigError):
    """A method got no steps, or steps it cannot use."""


class ScopeError(ConfigError):
    """The scope's patterns match nothing, or a tensor in it cannot be trained in place."""


class TunerError(SelectuneError, RuntimeError):
    """Something went wrong between attach and detach."""


class AlreadyAttachedError(TunerError):
    """The model carries a tuner already."""


class DetachedError(TunerError):
    """The tuner was taken off its model."""


class OptimizerError(TunerError):
    """An optimizer holds the frozen weights and not the values, or steps that the tuner never took."""


class AccumulationError(TunerError):
    """A step saw more backward passes than `accumulation_steps` announced."""


class CalibrationError(TunerError):
    """A method that reads examples got none, or examples it cannot use."""


class IntegrityError(TunerError):
    """A weight outside the support differs from the base."""


class NothingTrainedError(TunerError):
    """Nothing was selected, or no selected scalar moved."""


class DeltaError(SelectuneError, RuntimeError):
    """Something is wrong with a delta or with its use."""


class DeltaFormatError(DeltaError):
    """The file is not a delta, is damaged, or is of a later version."""


class CheckpointError(DeltaError):
    """A checkpoint is incomplete or damaged: its files are not those that its manifest names."""


class BaseMismatchError(DeltaError):
    """The model is not the base that the delta was made on."""


class DeltaStateError(DeltaError):
    """A delta was applied twice, reverted out of order, or applied under a tuner."""


class DeltaTimeoutError(DeltaStateError, TimeoutError):
    """Other threads used the model for longer than the timeout that was given."""


class NonFiniteError(DeltaError):
    """NaN or infinity stands among the trained values."""


class StoppedError(SelectuneError):
    """A run was asked to stop. `step`: after which it did; `signal`: what asked."""

    def __init__(self, message: str, step: int, signal: int) -> None:
        super().__init__(message)
        self.step, self.signal = step, signal


class ModelError(SelectuneError):
    """A model cannot be found or loaded."""


class PluginError(SelectuneError):
    """A plug-in raised, or offers something that cannot be taken."""


class TaskError(SelectuneError):
    """A task, a split or a data file cannot be found or read."""


class UnknownTaskError(TaskError, ConfigError):
    """A name that is no task's."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that is most like it, or nothing.

    >>> did_you_mean("lroa", ("lora", "dora")), did_you_mean("what", ("lora", "dora"))
    (' Did you mean lora?', '')
    """
    near = difflib.get_close_matches(given, list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""
