"""attach: put a tuner on a model. Everything a user touches while training is on the `Tuner`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selectune import ops
from selectune.delta import Delta
from selectune.errors import ConfigError, DetachedError, IntegrityError
from selectune.method import Method
from selectune.scope import VALUES, Found
from selectune.train import proof, ranks
from selectune.train.check import Check, check
from selectune.train.choose.calibrate import Batches, Loss, again, calibrate, check_rereadable
from selectune.train.choose.dense_phase import Phase
from selectune.train.choose.scan import check_score
from selectune.train.graph import copies
from selectune.train.ledger import Ledger
from selectune.train.proof import Verification
from selectune.train.saved import state, to_delta
from selectune.train.step_hooks import StepHooks
from selectune.train.tracker import Tracker

log = logging.getLogger("selectune")


def attach(
    model: nn.Module,
    method: Method,
    *,
    seed: int = 0,
    accumulation_steps: int = 1,
    calibration: Batches | None = None,
    loss: Loss | None = None,
) -> Tuner:
    """Freezes a model and lets `method` train B of its scalars in place.

    The ordinary training loop follows, with no extra call in it: any torch optimizer over
    `tuner.parameters()`, or `transformers.Trainer` on the model. Gradients of the weights are formed at
    the support only, optimizer state is O(B), unselected weights keep their bits.

    `accumulation_steps`: backward passes that make one optimizer step; the selection is exact over their
    sum. `calibration`, `loss`: what a calibrated score is read from (`selectune.types.Reads`): single
    examples, mini-batches or inputs (an iterable, or a callable that gives one), and `loss(model, batch)`.
    `seed`: for methods that draw. Costs one pass over the weights (a checksum) and O(B) memory.

    Raises ScopeError, BudgetError, ScheduleError before anything changes; AlreadyAttachedError for a
    second attach; CalibrationError.

    >>> import torch, selectune as st
    >>> model = torch.nn.Linear(8, 4)
    >>> tuner = st.attach(model, st.id3(budget=6, steps=3))
    >>> optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    >>> for _ in range(3):
    ...     model(torch.randn(5, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> tuner.selected, tuner.verify().changed
    (6, 6)
    >>> tuner.detach()
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"attach takes a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(method, Method):
        raise ConfigError(f"attach takes a selectune.Method, which the recipes make, got {type(method).__name__}.")
    if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int) or accumulation_steps < 1:
        raise ConfigError(f"accumulation_steps= must be an int of at least 1, got {accumulation_steps!r}.")
    copies.refuse_attached(model)
    to_delta.check_names(model)
    ranks.refuse_many()
    return Tuner(model, method, seed, accumulation_steps, calibration, loss)


class Tuner:
    """A model in training: its B values, its support, its budget. Made by `attach`.

    >>> import torch, selectune as st
    >>> tuner = st.attach(torch.nn.Linear(8, 4), st.pafi(budget=0.25))
    >>> tuner
    Tuner(pafi, selected 9 of 9, step 0; 9 of 36 scalars (25.00 %))
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        seed: int,
        accumulation_steps: int,
        calibration: Batches | None,
        loss: Loss | None,
    ) -> None:
        found = method.scope.find(model)
        schedule = None if method.schedule is None else method.schedule.resolve(found.eligible)
        self.method, self.schedule, self.seed = method, schedule, seed
        self.budget = 0 if schedule is None else int(schedule.budget or 0)
        if method.fill == "zero":
            at_once = 0 if schedule is None else schedule.target(0)
            if schedule is None or not schedule.keeps or at_once != self.budget:
                raise ConfigError(
                    'fill="zero" needs the whole budget selected at attach, as OneShot does; '
                    f"{type(schedule).__name__} selects {at_once} of {self.budget} then."
                )
        if method.score is not None:
            check_score(method.score, found.tensors)
        self._model: nn.Module | None = model
        self._all = found if schedule is not None or method.dense is not None else Found((), found.dense)
        self._phase: Phase | None = None
        with ExitStack() as on:  # what is put on the model comes off with detach, and now if anything fails
            self._put_on(model, calibration, loss, accumulation_steps, on)
            self._on = on.pop_all()

    def _put_on(
        self, model: nn.Module, calibration: Batches | None, loss: Loss | None, accumulation_steps: int, on: ExitStack
    ) -> None:
        method, schedule, seed, tensors = self.method, self.schedule, self.seed, self._all.tensors
        self._ledger = Ledger(tensors, self.budget)
        to_delta.warn_of_zeros(method, self._all, self.budget)
        self._base = proof.BaseCopy(model, self._all)
        on.enter_context(copies.frozen(model))
        on.callback(copies.sweep, model)  # nothing is left, wherever it is interrupted
        ready = None
        if method.score is not None and (method.score.reads.calibrated or method.score.drawn):
            if schedule is not None and not schedule.keeps:
                check_rereadable(method.score, calibration)
            ready = calibrate(model, method.score, tensors, calibration, loss, seed)
        for tensor in self._all.dense:
            tensor.parameter.requires_grad_(True)
        carrier = copies.carrier(model)
        if tensors:
            on.callback(carrier._parameters.pop, VALUES, None)
            carrier.register_parameter(VALUES, self._ledger.offsets)
        on.callback(self._put_back, model)
        self._tracker = Tracker(model, method, schedule, tensors, self._ledger, seed, accumulation_steps)
        on.callback(self._tracker.taps.remove)
        if method.dense is not None and tensors:
            self._phase = Phase(carrier, method.dense, schedule, self._all, self._tracker, self._base)
            log.warning(
                "The dense phase of %s holds %s bytes beside the model: a copy of the base, what is trained, its "
                "gradients, with AdamW two moments of each, and memory that tensors use in turn.", method.name,
                f"{self._phase.bytes():,}",
            )  # fmt: skip
        frozen = [t.parameter for t in tensors]
        self._step_hooks = StepHooks(self._tracker, self.parameters(), frozen, self._phase)
        self._tracker.keepalive = self._step_hooks  # training goes on when only the model is kept
        on.callback(self._step_hooks.remove)
        for handle in (
            carrier.register_state_dict_post_hook(copies.hide_vector),
            carrier.register_load_state_dict_post_hook(copies.expect_no_vector),
            model.register_load_state_dict_post_hook(copies.OfTuner(self._weights_loaded)),
        ):
            on.callback(handle.remove)
        if ready is not None and schedule is not None and schedule.keeps:
            self._tracker.prepare(ready)
        elif ready is not None:
            rescore = again(ready, model, method.score, tensors, calibration, loss, seed)
            self._tracker.chooser.rescore = self._tracker.taps.resting(rescore)
        if schedule is not None and schedule.target(0) == self.budget:
            self._tracker.select_ahead()
        if method.fill == "zero":
            self._base.zero_unselected(model, self._ledger)

    def _put_back(self, model: nn.Module) -> None:
        self._ledger.write_base()
        self._base.restore(model)
        if self.in_dense_phase and self._phase is not None:
            self._phase.free()

    # -- what is trained

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer gets: the offsets (B,), what a dense phase trains while on, the tensors trained wholly.

        An offset is how far a selected scalar went from the weight it had when it was selected; 0 at first.
        """
        offsets = [self._ledger.offsets] if self._ledger.offsets.numel() else []
        latents = [] if self._phase is None else self._phase.parameters()
        return [*offsets, *latents, *(t.parameter for t in self._all.dense)]

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """`parameters()` as an optimizer's groups: one for each learning rate, that of the method where it has one.

        >>> import torch, selectune as st
        >>> tuner = st.attach(torch.nn.Linear(8, 4), st.diff_pruning(budget=6, steps=10))
        >>> [(len(group["params"]), group["lr"]) for group in tuner.parameter_groups(lr=1e-4)]
        [(3, 0.0001), (4, 0.1)]
        """
        own = {} if self._phase is None else self._phase.rates()
        groups: dict[float | None, list[nn.Parameter]] = {None: []}
        for parameter in self.parameters():
            groups.setdefault(own.get(id(parameter)), []).append(parameter)
        return [{"params": found, "lr": lr if rate is None else rate} for rate, found in groups.items() if found]

    @property
    def in_dense_phase(self) -> bool:
        """Whether every entry in scope is being trained; a delta then holds these tensors whole."""
        return self._phase is not None and self._phase.on

    @property
    def _found(self) -> Found:
        """What is selected from and what is trained wholly, at present."""
        return Found((), (*self._all.dense, *self._all.tensors)) if self.in_dense_phase else self._all

    @property
    def model(self) -> nn.Module:
        """The model in training; DetachedError once the tuner is off."""
        if self._model is None:
            raise DetachedError("This tuner was detached; its model is the base again. Attach anew to train.")
        return self._model

    @property
    def selected(self) -> int:
        """Scalars selected so far, at most `budget`."""
        return self._ledger.selected

    @property
    def touched(self) -> int:
        """Scalars that were ever selected: more than `selected` only under a repeat schedule."""
        return self._ledger.touched

    @property
    def trained(self) -> int:
        """Scalars that may differ from the base: touched, and all of the tensors trained wholly."""
        return (0 if self.in_dense_phase else self.touched) + sum(t.parameter.numel() for t in self._found.dense)

    @property
    def values(self) -> Tensor:
        """The selected scalars as they are trained (B,), in order of selection: weight at selection + offset, wide."""
        return self._ledger.values()

    @property
    def support(self) -> dict[str, Tensor]:
        """{parameter name: sorted flat int64 indices} of the selected entries; tensors without any are left out."""
        pages = zip(self._all.tensors, self._ledger.pages, strict=True)
        return {t.name: p.flat.cpu() for t, p in pages if p.flat.numel()}

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self._tracker.step

    @property
    def steps(self) -> int | None:
        """Optimizer steps over which the schedule unmasks the budget, if it has such a number."""
        return None if self.schedule is None else self.schedule.steps

    @property
    def quota(self) -> int:
        """Entries that the schedule asks for at the coming step."""
        return self._tracker.quota

    @property
    def accumulation_steps(self) -> int:
        """Backward passes that make one optimizer step."""
        return self._tracker.accumulation_steps

    @property
    def events(self) -> Counter[str]:
        """How often something out of the ordinary happened: skipped_steps, nonfinite_selections, shortfall ..."""
        return self._tracker.events

    @property
    def unreached(self) -> list[str]:
        """Names of tensors that hold selected entries and never sent a gradient."""
        pages = zip(self._all.tensors, self._ledger.pages, strict=True)
        reached = self._tracker.reached | (set() if self._phase is None else self._phase.reached)
        return [t.name for t, p in pages if p.flat.numel() and t.index not in reached]

    # -- proof, file, end

    @torch.no_grad()
    def verify(self) -> Verification:
        """Proves by bits that only touched scalars differ from the base, at most the budget of them.

        One pass over the weights. Raises IntegrityError naming the tensors that moved, were replaced or joined.
        """
        model = self.model
        if not self.in_dense_phase:
            strays = self._ledger.strays() if self._tracker.current else []
            if strays:
                raise IntegrityError(proof.written(strays))
            self._tracker.write_weights()
        self._base.check(model, self._ledger)
        changed = sum(
            int((ops.bits(ops.gather_entries(t.parameter.detach(), p.touched()[0])) != ops.bits(p.touched()[1])).sum())
            for t, p in zip(self._found.tensors, self._ledger.pages, strict=False)
        )
        dense = sum(t.parameter.numel() for t in self._found.dense)
        zeroed = sum(base.numel() for base in self._base.filled.values()) - (self.selected if self._base.filled else 0)
        return Verification(changed, self.selected, self.touched, self.budget, dense, len(self.support), zeroed)

    def check(self, batch: Any, loss: Loss | None = None) -> Check:
        """Holds all gradients against plain autograd's on one small batch: whether every use of a weight is seen.

        `loss(model, batch)` gives a scalar; without it `model(**batch).loss`. Three passes, one dense gradient at a
        time; nothing is changed. Raises IntegrityError that names tensors, ConfigError for a loss that is no scalar."""
        return check(self, batch, loss)

    @torch.no_grad()
    def delta(
        self,
        *,
        base: Mapping[str, Any] | None = None,
        info: Mapping[str, Mapping[str, Any]] | None = None,
        old_values: bool = False,
        order: bool = False,
        allow_empty: bool = False,
        full: bool = True,
    ) -> Delta:
        """The delta as it stands, in memory, verified. See `save`."""
        changed, kept = self.verify().changed, (self._found, self._ledger, self._base)
        return to_delta.delta_of(self, *kept, changed, base, info or {}, old_values, order, allow_empty, full)

    def save(
        self,
        path: str | Path,
        *,
        base: Mapping[str, Any] | None = None,
        info: Mapping[str, Mapping[str, Any]] | None = None,
        old_values: bool = False,
        order: bool = False,
        allow_empty: bool = False,
        full: bool = True,
    ) -> Path:
        """Writes the delta: a folder gets `delta.safetensors`, a path ending in .safetensors is the file.

        Durable and atomic: a save that returned survives a crash, one that did not changes nothing.
        `base`: where the base came from (id, revision, seed), for `eval`; see `selectune.delta.base_info`. A
        transformers model says it itself, and which tensors no checkpoint held. `info`: more fields of the delta's
        info, {"method": {"task": ...}}, JSON values.
        `old_values`: also store the base's values, so that a revert needs no base. `order`: also store the order
        of selection, every smaller budget's mask. `full`: with a digest of all the base's weights, read at the first
        save, so that a base is told apart from one that differs anywhere.
        Raises ConfigError, NothingTrainedError, NonFiniteError, IntegrityError before a file is touched.
        """
        made = self.delta(base=base, info=info, old_values=old_values, order=order, allow_empty=allow_empty, full=full)
        return made.save(path)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The run between two steps: {"info": JSON values, "tensors": {key: tensor}}, O(B) but for what trains densely.

        With the optimizer's own state dict it continues bit for bit. Raises TunerError within an accumulation window.
        """
        return state.state_of(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`: on a fresh base attached alike, or back to another step of this run.

        Bit for bit, if the optimizer loads its own. Raises ConfigError for the state of another run, or one
        whose parts do not fit, BaseMismatchError for another base, TunerError within a step; nothing is changed then.
        """
        state.load_into(self, state_dict)

    @torch.no_grad()
    def detach(self) -> None:
        """Takes the tuner off: the model is the base again, bit for bit, and trainable as it was before."""
        self.model  # noqa: B018  (raises for one that is off)
        self._on.close()
        self._model = None

    @torch.no_grad()
    def _weights_loaded(self, module: nn.Module, incompatible: Any) -> None:
        del module, incompatible
        now = dict(self.model.named_parameters(remove_duplicate=False))
        moved = self._base.replaced(now) + self._base.moved(self.model, self._ledger)
        if moved:
            raise IntegrityError(
                f"load_state_dict changed {len(moved)} tensors outside the support: {', '.join(moved[:5])}. To go on "
                "with a run, load the tuner's state before its weights (selectune.integrations does, for accelerate, "
                "Lightning and the Trainer); other weights are loaded before attach, or after detach."
            )
        if self.in_dense_phase and self._phase is not None:
            self._phase.weights_changed()
        else:
            self._tracker.weights_changed()

    def __repr__(self) -> str:
        total = sum(p.numel() for p in {id(p): p for p in self._base.objects.values()}.values())
        share = f"{self.trained:,} of {total:,} scalars ({100 * self.trained / max(1, total):.2f} %)"
        return f"Tuner({self.method.name}, selected {self.selected:,} of {self.budget:,}, step {self.step}; {share})"
