"""Follows any torch optimizer through torch's own step hooks, without a call in the user's loop."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from selectune.errors import OptimizerError
from selectune.frames import Call
from selectune.train.aside import refuse_away
from selectune.train.choose.dense_phase import DenseThenSparse
from selectune.train.optim.contract import Factored, Inheriting, Placed
from selectune.train.optim.holders import held
from selectune.train.support.positions import LedgerPositions
from selectune.train.tracker import Tracker
from selectune.types import Reads

_all_hooks: weakref.WeakSet[StepHooks] = weakref.WeakSet()


class StepHooks:
    """Reports the steps of every optimizer that holds a run's parameters to its tracker, while it is kept alive."""

    def __init__(self, tracker: Tracker, trained: list[nn.Parameter], frozen: list[nn.Parameter]) -> None:
        self.tracker = tracker
        self._placed: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # the support each knows
        self.trained = {id(p) for p in trained}
        self.frozen = {id(p) for p in frozen}
        self._met: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # those that have stepped
        _install()
        _all_hooks.add(self)

    def remove(self) -> None:
        _all_hooks.discard(self)

    def strangers(self) -> None:
        """The run continues from another step, so every optimizer is checked again at its next step."""
        self._met.clear()

    @property
    def phase(self) -> DenseThenSparse | None:
        """The dense phase that is on, if any."""
        chooser = self.tracker.chooser
        return chooser if isinstance(chooser, DenseThenSparse) and chooser.dense else None

    def before_step(self, optimizer: torch.optim.Optimizer, call: Call, closure: bool) -> None:
        tracker, mine, phase = self.tracker, held(optimizer), self.phase
        if mine & {*self.trained, *self.frozen}:
            refuse_away(tracker, f"This {type(optimizer).__name__} steps")
        if optimizer not in self._met and mine & self.trained:
            self._meet(optimizer)
        if phase is not None:
            if phase.last_word(optimizer, mine, self.frozen):
                tracker.clock.call = call
        elif mine & self.trained:
            if tracker.tensors and id(tracker.ledger.offsets) not in mine:
                return
            self._check(optimizer)
            scale = getattr(optimizer, "grad_scale", None)  # of a scaler, if the optimizer unscales by itself
            tracker.holders.add(optimizer)
            tracker.before_step(call, 1.0 if scale is None else 1.0 / float(scale))
            if not closure:
                tracker.close_short()
            if not _skips(optimizer):
                self._inform(optimizer)
        elif mine & self.frozen:
            raise OptimizerError(
                f"This {type(optimizer).__name__} holds {len(mine & self.frozen)} weights that attach froze and not "
                "the tuner's offsets, so its step would train nothing. Make the optimizer after attach, over "
                "tuner.parameters()."
            )

    def after_closure(self, optimizer: torch.optim.Optimizer) -> None:
        """The closure of a step has run; its backward passes belong to the window of this step."""
        if self.phase is None and id(self.tracker.ledger.offsets) in held(optimizer):
            self.tracker.close_short()
            self._inform(optimizer)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        tracker, mine, phase = self.tracker, held(optimizer), self.phase
        if phase is not None or _skips(optimizer):
            tracker.clock.call = None
            if phase is not None and not _skips(optimizer) and phase.counts(mine):
                tracker.commit_dense()
            return
        if mine & ({id(tracker.ledger.offsets)} if tracker.tensors else self.trained):
            if tracker.chooser.score.reads is Reads.FACTORS and isinstance(optimizer, Factored):
                tracker.chooser.factors = optimizer.factors(tracker.ledger.offsets)
            tracker.commit()

    def _meet(self, optimizer: torch.optim.Optimizer) -> None:
        """Checks the state that an optimizer holds for the run's parameters before its first step in this run.

        A weight that is its own latent counts only beside the offsets: an optimizer may have trained it before attach.
        """
        values = self.tracker.ledger.offsets
        phase = self.phase
        own = {id(values)} | {id(p) for p in ([] if phase is None else phase.parameters())}
        for group in optimizer.param_groups:
            beside = any(p is values for p in group["params"])
            for parameter in group["params"]:
                if id(parameter) in own and (beside or id(parameter) not in self.frozen):
                    taken = _taken(optimizer.state.get(parameter, {}), parameter.detach())
                    if self.tracker.step == 0 and taken:
                        raise OptimizerError(
                            f"This {type(optimizer).__name__} has {taken} behind it with the tuner's offsets, and the "
                            "tuner is at step 0: the optimizer's state was loaded and the tuner's was not. Call "
                            "tuner.load_state_dict with the state saved beside it (SelectuneCallback does, see "
                            "selectune.integrations), or make a new optimizer to start again."
                        )
        self._met.add(optimizer)

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        score = self.tracker.chooser.score
        if score.reads is Reads.FACTORS and not isinstance(optimizer, Factored):
            raise OptimizerError(
                f"The score '{score.name}' reads the optimizer's numbers for rows and columns, and "
                f"{type(optimizer).__name__} holds no such thing. Take selectune.SparseSM3."
            )

    def _inform(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives the optimizer the positions of its entries and the new ones, if it asks for them."""
        ledger, new = self.tracker.ledger, self.tracker.chooser.new_entries
        if isinstance(optimizer, Placed) and self._placed.get(optimizer) != ledger.changes:
            self._placed[optimizer] = ledger.changes
            optimizer.place(ledger.offsets, LedgerPositions(ledger))
        if new is None:
            return
        if isinstance(optimizer, Inheriting):
            optimizer.inherit(ledger.offsets, new)
        else:
            _forget(optimizer, ledger.offsets, new.slots)


@functools.cache
def _install() -> None:
    """One pair of hooks for the life of the process; torch cannot remove them while it runs them."""

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        call, all_hooks = Call(), list(_all_hooks)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        for hooks in all_hooks:
            hooks.before_step(optimizer, call, callable(closure))
        if not all_hooks or not callable(closure):
            return None
        watched = _watched(closure, optimizer, all_hooks)
        return ((args[0], watched, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": watched})

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for hooks in list(_all_hooks):
            hooks.after_step(optimizer)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _watched(closure: Callable[..., Any], optimizer: torch.optim.Optimizer, all_hooks: list[StepHooks]) -> Any:
    """The closure of a step, which reports to the run when it has ended."""

    @functools.wraps(closure)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = closure(*args, **kwargs)
        for hooks in all_hooks:
            hooks.after_closure(optimizer)
        return result

    return run


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer is about to skip a scaler's step by itself."""
    broken = getattr(optimizer, "found_inf", None)
    return broken is not None and bool(broken)


def _taken(state: Mapping[str, Any], parameter: Tensor) -> str:
    """How many steps an optimizer's state of a parameter comes from, in words; "" for none."""
    if "step" in state:
        steps = int(torch.as_tensor(state["step"]).max())
        return f"{steps} step{'s' if steps != 1 else ''}" if steps > 0 else ""
    held = [tensor for tensor in state.values() if isinstance(tensor, Tensor) and bool(tensor.any())]
    return "steps" if any(t.shape != parameter.shape or not torch.equal(t, parameter) for t in held) else ""


def _forget(optimizer: torch.optim.Optimizer, values: Tensor, slots: Tensor) -> None:
    """Sets the elementwise state (moments) of slots with new entries to 0."""
    for state in optimizer.state.get(values, {}).values():
        if isinstance(state, Tensor) and state.shape == values.shape:
            state[slots] = 0
