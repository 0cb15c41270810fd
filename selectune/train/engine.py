"""The parts of one tuner, and how they are put on a model: in this order, and taken off in the reverse."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace

from torch import nn

from selectune import ops
from selectune.errors import ConfigError, TunerError
from selectune.method import Method
from selectune.quantised import BESIDE, quantised_weights
from selectune.scope import VALUES, Found
from selectune.seeds import mixed
from selectune.train.aside import Aside
from selectune.train.choose.calibrate import Batches, Loss, again, calibrate, check_rereadable
from selectune.train.choose.chooser import Chooser
from selectune.train.choose.dense_phase import DenseThenSparse
from selectune.train.choose.dropping import Dropping
from selectune.train.choose.growing import Afresh, Growing
from selectune.train.choose.scan import check_score, warn_of_zeros
from selectune.train.graph import copies
from selectune.train.step_hooks import StepHooks
from selectune.train.support.ledger import Ledger
from selectune.train.support.proof import BaseCopy
from selectune.train.support.shards import Shards
from selectune.train.tracker import Tracker
from selectune.train.world import World, support_digest
from selectune.types import DropAndGrow, Schedule

log = logging.getLogger("selectune")


@dataclass
class Engine:
    """The parts of one run. Each owns its state and gives it out; none reaches into another."""

    model: nn.Module
    method: Method
    schedule: Schedule | None
    seed: int
    budget: int
    found: Found  # the tensors that are selected from, and those that are trained whole
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
        """The tensors that are selected from and those that are trained whole, at present."""
        found = self.found
        return Found((), (*found.whole, *found.tensors)) if self.chooser.dense else found

    def aside(self) -> Aside:
        """Takes the trained values off the model; `Aside.back` puts them back."""
        return Aside(self.model, self.found.tensors, self.now.whole, self.base, self.tracker)

    def unreached(self) -> list[str]:
        """Names of tensors that hold selected entries and never sent a gradient."""
        reached = self.tracker.reached | (self.phase.reached if self.phase is not None else set())
        pages = zip(self.found.tensors, self.ledger.pages, strict=True)
        return [t.name for t, page in pages if page.flat.numel() and t.index not in reached]

    def parameters(self) -> list[nn.Parameter]:
        """See `Tuner.parameters`."""
        return trained(self.chooser, self.found)


def trained(chooser: Chooser, found: Found) -> list[nn.Parameter]:
    """The offsets, the latents of a dense phase that is on, the whole tensors."""
    offsets = [chooser.ledger.offsets] if chooser.ledger.offsets.numel() else []
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
    """Puts a method on a model. Everything put there comes off with `on`, even if something raises within.

    1 the scope and the budget                     2 the base's checksums and copies   3 all weights frozen
    4 scores that are read from data               5 the vector on the model           6 the chooser and the tracker
    7 selections that read no gradient             8 unselected entries set to 0, if the method says so
    """
    # 1
    around = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
    model = model if around is None else around.module
    shards = Shards(model)
    on.callback(shards.rest)
    found = shards.within(method.scope.find(model))
    schedule = method.resolve(found)
    budget = 0 if schedule is None else int(schedule.budget or 0)
    _check_fill(method, schedule, budget)
    _check_units(method, schedule, budget)
    _check_quantised(method, found)
    _check_beside(model)
    if method.score is not None:
        check_score(method.score, found.tensors)
    if shards:
        _refuse_sharded(method)
    if schedule is None and method.dense is None:
        found = Found((), found.whole)
    tensors = found.tensors
    ledger = Ledger(tensors, budget)
    warn_of_zeros(method, tensors, budget)
    # 2, 3
    base = BaseCopy(model, found, shards)
    on.enter_context(copies.frozen(model))
    on.callback(copies.sweep, model)  # leaves nothing on the model, wherever attach is interrupted
    # 4
    keeps = schedule is None or schedule.keeps
    scores = rescore = None
    if method.score is not None and (method.score.reads.calibrated or method.score.drawn):
        if not keeps:
            check_rereadable(method.score, calibration)
        how = (model, method.score, tensors, calibration, loss, seed)
        scores = calibrate(*how)
        rescore = None if keeps else again(scores, *how)
    # 5
    for tensor in found.whole:
        tensor.parameter.requires_grad_(True)
    carrier = copies.carrier(model)
    if tensors:
        on.callback(carrier._parameters.pop, VALUES, None)
        carrier.register_parameter(VALUES, ledger.offsets)
    # 6
    run = (replace(method, structure=method.structure.sized(model)), schedule, ledger, seed, rescore)
    chooser: Chooser
    if method.dense is not None and tensors:
        chooser = DenseThenSparse(*run, kind=method.dense, found=found, base=base, carrier=carrier)
    elif isinstance(schedule, DropAndGrow):
        chooser = Dropping(*run)
    else:
        chooser = Growing(*run) if keeps else Afresh(*run)
    on.callback(chooser.leave)
    on.callback(base.restore, model)
    on.callback(ledger.write_base)
    world = World(model, ledger, lambda: _in_common(method, seed, accumulation_steps, base, tracker), shards)
    tracker = Tracker(model, chooser, accumulation_steps, world)
    on.callback(tracker.taps.remove)
    if isinstance(chooser, DenseThenSparse):
        log.warning(
            "The dense phase of %s holds %s bytes beside the model: a copy of the base, what is trained, its "
            "gradients, with AdamW two moments of each, and memory that tensors use in turn.", method.name,
            f"{chooser.bytes():,}",
        )  # fmt: skip
    for hook in () if around is None else world.take_over(around):
        on.callback(hook.remove)
    for hook in world.average_whole([tensor.parameter for tensor in found.whole]) if world.averages else ():
        on.callback(hook.remove)
    hooks = StepHooks(tracker, trained(chooser, found), [t.parameter for t in tensors])
    tracker.keepalive = hooks  # training goes on when only the model is kept
    on.callback(hooks.remove)
    for handle in (
        carrier.register_state_dict_post_hook(copies.hide_vector),
        carrier.register_load_state_dict_post_hook(copies.expect_no_vector),
    ):
        on.callback(handle.remove)
    # 7, 8
    if scores is not None and keeps:
        chooser.prepare(scores)
    world.meet()
    if schedule is not None and schedule.target(0) == budget:
        tracker.select_ahead()
    if method.fill == "zero":
        base.zero_unselected(model, ledger)
    return Engine(model, method, schedule, seed, budget, found, ledger, base, tracker, hooks)


def _in_common(method: Method, seed: int, accumulation_steps: int, base: BaseCopy, tracker: Tracker) -> dict[str, int]:
    """Digests of what all ranks of a run must share."""
    if isinstance(tracker.chooser, DenseThenSparse):
        raise TunerError(
            f"{method.name} trains every entry for a while, which a tuner does in one process only. Train in one "
            "process (without torchrun or accelerate's launch), or take a method without a dense phase."
        )
    run = {"method": repr(method), "seed": str(seed), "accumulation_steps": str(accumulation_steps)}
    told = {name: mixed(*text.encode()) for name, text in run.items()}
    weights = {f'weight "{name}"': total for name, total in base.sums.items()}
    whole = {f'weight "{name}"': ops.checksum(tensor) for name, tensor in base.whole.items()}
    return told | weights | whole | {"step": tracker.step, "support": support_digest(tracker.ledger)}


def _refuse_sharded(method: Method) -> None:
    """Raises TunerError for a method that reads or writes whole weights."""
    score = method.score
    why = None
    if method.dense is not None:
        why = "trains every entry for a while"
    elif score is not None and (score.reads.calibrated or score.drawn):
        why = f"reads calibration data for its score '{score.name}'"
    elif method.fill == "zero":
        why = "sets the unselected entries to 0"
    if why is not None:
        raise TunerError(
            f"{method.name} {why}, which a tuner does not do on sharded weights. Train without fully_shard, or take "
            "a method that selects by weights, at random or by the gradients of training."
        )


def _check_quantised(method: Method, found: Found) -> None:
    """Refuses what a quantised weight cannot do: its numbers do not move, and no gradient of all of them is kept."""
    if not (name := next((t.name for t in found.tensors if t.quantised is not None), None)):
        return
    why = None
    if method.fill == "zero":
        why = 'fill="zero" sets the entries outside the support to 0'
    elif method.dense is not None:
        why = f"{method.name} trains every entry for a while"
    elif method.score is not None and method.score.reads.calibrated:
        why = f"the score '{method.score.name}' sums gradients of every entry over data before training"
    if why:
        raise ConfigError(
            f'{why}, and the bits of a quantised weight such as "{name}" stay as they are. Take a method that selects '
            "by the gradient of a step, by the weights or at random, or a base in full precision."
        )


def _check_beside(model: nn.Module) -> None:
    """Refuses a base with offsets beside its weights: digests of stored bits would not tell it from the bare one."""
    for weight in quantised_weights(model).values():
        side = weight.owners[0].__dict__.get(BESIDE)
        if side is not None and side.held[0].numel():
            raise TunerError(
                f"A delta is applied beside the quantised weights of {type(model).__name__}, and what is trained on "
                "top of it would fit no base. Revert it first; to train on, resume its run."
            )


def _check_fill(method: Method, schedule: Schedule | None, budget: int) -> None:
    if method.fill != "zero":
        return
    at_once = 0 if schedule is None else schedule.target(0)
    if schedule is None or not schedule.keeps or at_once != budget:
        raise ConfigError(
            'fill="zero" needs the whole budget selected at attach, as OneShot does; '
            f"{type(schedule).__name__} selects {at_once} of {budget} then."
        )


def _check_units(method: Method, schedule: Schedule | None, budget: int) -> None:
    if not method.structure.plain and schedule is not None and schedule.target(0) != budget:
        raise ConfigError(
            f"Whole units are chosen all at once, as OneShot and Repeat do; {type(schedule).__name__} selects "
            f"{schedule.target(0)} of {budget} scalars at the first step."
        )
