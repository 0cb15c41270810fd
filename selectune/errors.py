"""Every error a user can meet, in one tree.

SelectuneError
├── ConfigError              a value of a recipe, an axis or a command is not allowed   (also ValueError)
│   ├── BudgetError          a budget of 0, beyond the model, or neither count nor density
│   ├── RunFolderError       a run's folder that belongs to another run
│   ├── ScheduleError        a method without steps, or with steps that it cannot use
│   └── ScopeError           patterns that match nothing, tensors that cannot be trained in place
├── TunerError               attach, train, detach                                      (also RuntimeError)
│   ├── AlreadyAttachedError the model carries a tuner already
│   ├── DetachedError        the tuner was detached
│   ├── OptimizerError       an optimizer over frozen weights, or one with state of another step
│   ├── AccumulationError    more backward passes in a step than `accumulation_steps`
│   ├── CalibrationError     a method that reads data got none, or data that it cannot use
│   ├── IntegrityError       a weight outside the support has changed
│   └── NothingTrainedError  nothing was selected, or nothing moved
├── DeltaError               files and deltas                                           (also RuntimeError)
│   ├── DeltaFormatError     a file that is not a delta, is damaged, or is of a later version
│   ├── CheckpointError      a checkpoint that is incomplete or damaged
│   ├── BaseMismatchError    the model is not the base of the delta
│   ├── DeltaStateError      applied twice, reverted out of order, applied under a tuner
│   │   └── DeltaTimeoutError other threads used the model longer than the timeout          (also TimeoutError)
│   ├── HubError             the Hugging Face hub does not give or take a delta
│   └── NonFiniteError       NaN or infinity among the trained values
├── ModelError               a model that cannot be found or loaded
├── PluginError              a plug-in that raised, or offers something that cannot be taken
├── StudyError               a study that cannot be read, run or compared
├── StoppedError             a run stopped on request; its checkpoint is written
└── TaskError                a task, split or data file that cannot be found or read
    └── UnknownTaskError     no task has this name                                  (also ConfigError)

A message says what was wanted, why it is impossible, what was received and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SelectuneError(Exception):
    """Base of every error that selectune raises on purpose."""


class ConfigError(SelectuneError, ValueError):
    """A value of a recipe, an axis or a command is not allowed."""


class BudgetError(ConfigError):
    """The budget is 0, beyond the model, or neither a count nor a density."""


class RunFolderError(ConfigError):
    """The folder of a run belongs to another run: one that is going on, or one whose files would be overwritten."""


class ScheduleError(ConfigError):
    """A method got no steps, or steps that it cannot use."""


class ScopeError(ConfigError):
    """The scope's patterns match nothing, or a tensor in it cannot be trained in place."""


class TunerError(SelectuneError, RuntimeError):
    """Something went wrong between attach and detach."""


class AlreadyAttachedError(TunerError):
    """The model carries a tuner already."""


class DetachedError(TunerError):
    """The tuner was taken off its model."""


class OptimizerError(TunerError):
    """An optimizer holds frozen weights instead of the offsets, or state of steps that the tuner never took."""


class AccumulationError(TunerError):
    """A step had more backward passes than `accumulation_steps` announced."""


class CalibrationError(TunerError):
    """A method that reads data got none, or data that it cannot use."""


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


class HubError(DeltaError):
    """The Hugging Face hub does not give or take a delta, or cannot be reached."""


class NonFiniteError(DeltaError):
    """There is NaN or infinity among the trained values."""


class StoppedError(SelectuneError):
    """A run stopped on request, after step `step`. `signal`: the signal that asked for it."""

    def __init__(self, message: str, step: int, signal: int) -> None:
        super().__init__(message)
        self.step, self.signal = step, signal


class ModelError(SelectuneError):
    """A model cannot be found or loaded."""


class PluginError(SelectuneError):
    """A plug-in raised, or offers something that cannot be taken."""


class TaskError(SelectuneError):
    """A task, a split or a data file cannot be found or read."""


class StudyError(SelectuneError):
    """A study cannot be read, run or compared."""


class UnknownTaskError(TaskError, ConfigError):
    """No task has this name."""


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names of many, for a message.

    >>> some("abc"), some("abcdefg")
    ('a, b, c', 'a, b, c, d, e ...')
    """
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar known name, or nothing.

    >>> did_you_mean("lroa", ("lora", "dora")), did_you_mean("what", ("lora", "dora"))
    (' Did you mean lora?', '')
    """
    near = difflib.get_close_matches(given, list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""
