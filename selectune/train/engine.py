"""The parts of one attached tuner, and how they are put on a model: in this order, and off again in the reverse."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor, nn

from selectune.errors import ConfigError
from selectune.method import Method
from selectune.scope import VALUES, Found, ScopedTensor
from selectune.train.choose.calibrate import Batches, Loss, again, calibrate, check_rereadable
from selectune.train.choose.chooser import Chooser, Ground
from selectune.train.choose.dense_phase import DenseThenSparse
from selectune.train.choose.dropping import Dropping
from selectune.train.choose.growing import Afresh, Growing
from selectune.train.choose.scan import check_score, warn_of_zeros
from selectune.train.graph import copies
from selectune.train.ledger import Ledger
from selectune.train.proof import BaseCopy
from selectune.train.step_hooks import StepHooks
from selectune.train.tracker import Tracker
from selectune.types import DropAndGrow, Schedule

log = logging.getLogger("selectune")


@dataclass
class Engine:
    """One run's parts. Each owns its state and hands it out; nobody reaches into another's."""

    model: nn.Module
    method: Method
    schedule: Schedule | None
    seed: int
    budget: int
    found: Found  # what is selected from, and what is trained wholly
    ledger: Ledger
    base: BaseCopy
    tracker: Tracker
    step_hooks: StepHooks

    @property
    def chooser(self) -> Chooser:
        return self.tracker.chooser

    @property
    def phase(self) -> DenseThenSparse | None:
        """The chooser of a method with a dense phase, on or off."""
        return self.chooser if isinstance(self.chooser, DenseThenSparse) else None

    @property
    def now(self) -> Found:
        """What is selected from and what is trained wholly, at present."""
        found = self.found
        return Found((), (*found.whole, *found.tensors)) if self.chooser.dense else found

    def unreached(self) -> list[str]:
        """Names of tensors that hold selected entries and never sent a gradient."""
        reached = self.tracker.reached | (self.phase.reached if self.phase is not None else set())
        pages = zip(self.found.tensors, self.ledger.pages, strict=True)
        return [t.name for t, page in pages if page.flat.numel() and t.index not in reached]

    def parameters(self) -> list[nn.Parameter]:
        """See `Tuner.parameters`."""
        return trained(self.ledger, self.chooser, self.found)


def trained(ledger: Ledger, chooser: Chooser, found: Found) -> list[nn.Parameter]:
    """The offsets, the latents of a dense phase that is on, the tensors trained wholly."""
    offsets = [ledger.offsets] if ledger.offsets.numel() else []
    latents = chooser.parameters() if isinstance(chooser, DenseThenSparse) else []
    return [*offsets, *latents, *(t.parameter for t in found.whole)]


def assemble(
    on: ExitStack,
    model: nn.Module,
    method: Method,
    seed: int,
    accumulation_steps: int,
    calibration: Batches | None,
    loss: Loss | None,
) -> Engine:
    """Puts a method on a model. What is put there comes off with `on`, whatever raises within.

    1 what is in scope, how many are selected   2 the base's checksums and copies   3 all weights frozen
    4 scores that are read from data            5 the vector on the model           6 who chooses, who follows
    7 selections that read no gradient          8 what is not selected set to 0, if the method says so
    """
    found = method.scope.find(model)
    schedule = None if method.schedule is None else method.schedule.resolve(found.eligible)
    budget = 0 if schedule is None else int(schedule.budget or 0)
    _check_fill(method, schedule, budget)
    if method.score is not None:
        check_score(method.score, found.tensors)
    if schedule is None and method.dense is None:
        found = Found((), found.whole)
    tensors = found.tensors
    ledger = Ledger(tensors, budget)
    warn_of_zeros(method, tensors, budget)
    base = BaseCopy(model, found)
    on.enter_context(copies.frozen(model))
    on.callback(copies.sweep, model)  # nothing is left, wherever it is interrupted
    ready = _scores_from_data(model, method, schedule, tensors, calibration, loss, seed)
    for tensor in found.whole:
        tensor.parameter.requires_grad_(True)
    carrier = copies.carrier(model)
    if tensors:
        on.callback(carrier._parameters.pop, VALUES, None)
        carrier.register_parameter(VALUES, ledger.offsets)
    ground = Ground(method, schedule, tensors, ledger, seed)
    keeps = schedule is None or schedule.keeps
    if ready is not None and not keeps:
        ground.rescore = again(ready, model, method.score, tensors, calibration, loss, seed)
    chooser = _chooser(ground, found, base, carrier)
    on.callback(chooser.leave)
    on.callback(_put_back, model, ledger, base)
    tracker = Tracker(model, chooser, accumulation_steps)
    on.callback(tracker.taps.remove)
    if isinstance(chooser, DenseThenSparse):
        log.warning(
            "The dense phase of %s holds %s bytes beside the model: a copy of the base, what is trained, its "
            "gradients, with AdamW two moments of each, and memory that tensors use in turn.", method.name,
            f"{chooser.bytes():,}",
        )  # fmt: skip
    hooks = StepHooks(tracker, trained(ledger, chooser, found), [t.parameter for t in tensors])
    tracker.keepalive = hooks  # training goes on when only the model is kept
    on.callback(hooks.remove)
    for handle in (
        carrier.register_state_dict_post_hook(copies.hide_vector),
        carrier.register_load_state_dict_post_hook(copies.expect_no_vector),
    ):
        on.callback(handle.remove)
    if ready is not None and keeps:
        tracker.prepare(ready)
    if schedule is not None and schedule.target(0) == budget:
        tracker.select_ahead()
    if method.fill == "zero":
        base.zero_unselected(model, ledger)
    return Engine(model, method, schedule, seed, budget, found, ledger, base, tracker, hooks)


def _check_fill(method: Method, schedule: Schedule | None, budget: int) -> None:
    if method.fill != "zero":
        return
    at_once = 0 if schedule is None else schedule.target(0)
    if schedule is None or not schedule.keeps or at_once != budget:
        raise ConfigError(
            'fill="zero" needs the whole budget selected at attach, as OneShot does; '
            f"{type(schedule).__name__} selects {at_once} of {budget} then."
        )


def _scores_from_data(
    model: nn.Module,
    method: Method,
    schedule: Schedule | None,
    tensors: Sequence[ScopedTensor],
    calibration: Batches | None,
    loss: Loss | None,
    seed: int,
) -> list[Tensor] | None:
    """Scores that are read before training; None for a method that reads none."""
    score = method.score
    if score is None or not (score.reads.calibrated or score.drawn):
        return None
    if schedule is not None and not schedule.keeps:
        check_rereadable(score, calibration)
    return calibrate(model, score, tensors, calibration, loss, seed)


def _chooser(ground: Ground, found: Found, base: BaseCopy, carrier: nn.Module) -> Chooser:
    if ground.method.dense is not None and ground.tensors:
        return DenseThenSparse(ground, ground.method.dense, found, base, carrier)
    if isinstance(ground.schedule, DropAndGrow):
        return Dropping(ground)
    return Growing(ground) if ground.schedule is None or ground.schedule.keeps else Afresh(ground)


def _put_back(model: nn.Module, ledger: Ledger, base: BaseCopy) -> None:
    ledger.write_base()
    base.restore(model)
