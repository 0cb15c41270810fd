"""attach puts a tuner on a model. Everything a user needs while training is on the `Tuner`."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selectune.delta import Delta
from selectune.errors import ConfigError, DetachedError, IntegrityError, some
from selectune.method import Method
from selectune.train.aside import refuse_away
from selectune.train.check import Check, check
from selectune.train.choose.calibrate import Batches, Loss
from selectune.train.engine import assemble
from selectune.train.graph import copies
from selectune.train.saved import state, to_delta
from selectune.train.support.proof import Verification, overwritten
from selectune.train.world import written_by_first

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

    `accumulation_steps`: how many backward passes make one optimizer step; the selection is exact over their
    sum. `calibration`, `loss`: the data of a calibrated score (`selectune.types.Reads`): single examples,
    mini-batches or inputs, as an iterable or a callable that gives one; and `loss(model, batch)`.
    `seed`: for methods that draw. `model` may be a DistributedDataParallel; the tuner is then that of the model within,
    and averages its gradient itself. Costs one pass over the weights (a checksum) and O(B) memory.

    Raises ScopeError, BudgetError and ScheduleError before anything changes, AlreadyAttachedError for a
    second attach, and CalibrationError.

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
        with ExitStack() as on:  # all that is put on the model comes off with detach, or now if anything fails
            self.engine = assemble(on, model, method, seed, accumulation_steps, calibration, loss)
            self._model: nn.Module | None = (model := self.engine.model)
            handle = model.register_load_state_dict_post_hook(copies.OfTuner(self._weights_loaded))
            on.callback(handle.remove)
            self._on = on.pop_all()
        engine = self.engine
        self.method, self.schedule, self.seed, self.budget = engine.method, engine.schedule, engine.seed, engine.budget

    # -- what is trained

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer gets: the offsets (B,), the latents of a dense phase that is on, the whole tensors.

        An offset is the difference between a selected scalar and its weight at selection, so it starts at 0.
        """
        return self.engine.parameters()

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """`parameters()` as an optimizer's groups, one for each learning rate; a method may set some of the rates.

        >>> import torch, selectune as st
        >>> tuner = st.attach(torch.nn.Linear(8, 4), st.diff_pruning(budget=6, steps=10))
        >>> [(len(group["params"]), group["lr"]) for group in tuner.parameter_groups(lr=1e-4)]
        [(3, 0.0001), (4, 0.1)]
        """
        own = {} if self.engine.phase is None else self.engine.phase.rates()
        groups: dict[float | None, list[nn.Parameter]] = {None: []}
        for parameter in self.parameters():
            groups.setdefault(own.get(id(parameter)), []).append(parameter)
        return [{"params": params, "lr": lr if rate is None else rate} for rate, params in groups.items() if params]

    @property
    def in_dense_phase(self) -> bool:
        """Whether every entry in scope is being trained now; a delta then holds these tensors whole."""
        return self.engine.chooser.dense

    @property
    def model(self) -> nn.Module:
        """The model in training; DetachedError once the tuner is off."""
        if self._model is None:
            raise DetachedError("This tuner was detached; its model is the base again. Attach anew to train.")
        return self._model

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the model's weights, so that all processes must save together."""
        return bool(self.engine.base.shards)

    @property
    def selected(self) -> int:
        """Scalars selected so far, at most `budget`."""
        return self.engine.ledger.selected

    @property
    def touched(self) -> int:
        """Scalars that were ever selected: more than `selected` only under a schedule that repeats."""
        return self.engine.ledger.touched

    @property
    def trained(self) -> int:
        """Scalars that may differ from the base: those touched, and all of the whole tensors."""
        return (0 if self.in_dense_phase else self.touched) + sum(t.parameter.numel() for t in self.engine.now.whole)

    @property
    def values(self) -> Tensor:
        """The selected scalars (B,) in order of selection, in float32 or float64: weight at selection + offset."""
        return self.engine.ledger.values()

    @property
    def support(self) -> dict[str, Tensor]:
        """{parameter name: sorted flat int64 indices} of the selected entries; tensors without any are left out."""
        pages = zip(self.engine.found.tensors, self.engine.ledger.pages, strict=True)
        return {t.name: p.flat.cpu() for t, p in pages if p.flat.numel()}

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.engine.tracker.step

    @property
    def steps(self) -> int | None:
        """The schedule's number of optimizer steps, if it has one."""
        return None if self.schedule is None else self.schedule.steps

    @property
    def quota(self) -> int:
        """How many entries the schedule asks for at the coming step."""
        return self.engine.tracker.quota

    @property
    def cutoff(self) -> float | None:
        """The smallest score that the last selection took; None if it is not known.

        Known on the CPU, where entries are ranked over all tensors by a score that reads the step's gradient.
        """
        return self.engine.chooser.cutoff

    @property
    def entropy(self) -> float:
        """How evenly the selection spreads over the M tensors in scope: -sum p ln p / ln M, from 0 to 1. Costs O(M).

        p = P_j / sum P, and P_j is the selected share of tensor j. NaN if nothing is selected.
        """
        pages = zip(self.engine.found.tensors, self.engine.ledger.pages, strict=True)
        shares = [page.flat.numel() / max(1, tensor.form.numel()) for tensor, page in pages]
        if not (whole := math.fsum(shares)):
            return math.nan
        nats = -math.fsum(share / whole * math.log(share / whole) for share in shares if share)
        return nats / math.log(len(shares)) if len(shares) > 1 else 0.0

    @property
    def accumulation_steps(self) -> int:
        """Backward passes that make one optimizer step."""
        return self.engine.tracker.accumulation_steps

    @property
    def events(self) -> Counter[str]:
        """Counts of unusual events: skipped_steps, nonfinite_selections, shortfall ..."""
        return self.engine.tracker.events

    @property
    def unreached(self) -> list[str]:
        """Names of tensors that hold selected entries and never sent a gradient."""
        return self.engine.unreached()

    # -- proof, file, end

    @torch.no_grad()
    def verify(self) -> Verification:
        """Proves, bit by bit, that only touched scalars differ from the base.

        Costs one pass over the weights. Raises IntegrityError with the tensors that moved, were replaced or joined.
        """
        engine, ledger, base = self.engine, self.engine.ledger, self.engine.base
        refuse_away(engine.tracker, "The run is verified or saved")
        if not self.in_dense_phase:
            strays = ledger.strays() if engine.tracker.current else []
            if strays:
                raise IntegrityError(overwritten(strays))
            engine.tracker.write_weights()
        base.check(self.model, ledger)
        changed = 0 if self.in_dense_phase else ledger.changed()
        dense = sum(t.parameter.numel() for t in engine.now.whole)
        zeroed = sum(kept.numel() for kept in base.filled.values()) - (self.selected if base.filled else 0)
        return Verification(changed, self.selected, self.touched, self.budget, dense, len(self.support), zeroed)

    def check(self, batch: Any, loss: Loss | None = None) -> Check:
        """Compares all gradients with plain autograd's on one small batch, to find uses of weights that are not seen.

        `loss(model, batch)` gives a scalar; without it the loss is `model(**batch).loss`. Takes three passes, with
        one dense gradient at a time, and changes nothing. Raises IntegrityError that names tensors, and ConfigError
        for a loss that is no scalar.
        """
        self.model  # noqa: B018  (raises once the tuner is off)
        refuse_away(self.engine.tracker, "Gradients are checked")
        return check(self.engine, batch, loss)

    @torch.no_grad()
    def delta(
        self,
        *,
        base: Mapping[str, Any] | None = None,
        info: Mapping[str, Mapping[str, Any]] | None = None,
        old_values: bool = False,
        order: bool | None = None,
        allow_empty: bool = False,
        full: bool = True,
    ) -> Delta:
        """The present delta, in memory, verified. See `save`."""
        changed = self.verify().changed
        return to_delta.delta_of(self.engine, changed, base, info or {}, old_values, order, allow_empty, full)

    def save(
        self,
        path: str | Path,
        *,
        base: Mapping[str, Any] | None = None,
        info: Mapping[str, Mapping[str, Any]] | None = None,
        old_values: bool = False,
        order: bool | None = None,
        allow_empty: bool = False,
        full: bool = True,
    ) -> Path:
        """Writes the delta: a folder gets `delta.safetensors`, a path ending in .safetensors is the file.

        The write is durable and atomic: a save that returned survives a crash, and one that failed changes nothing.
        `base`: where the base came from (id, revision, seed), for `eval`; see `selectune.delta.base_info`. A
        transformers model knows it, and which of its tensors no checkpoint held. `info`: more fields of the delta's
        info, {"method": {"task": ...}}, with JSON values. `old_values`: also store the base's values, so that a
        revert needs no base. `order`: None also stores the step that selected each scalar, where the support grows step
        by step; it takes log2(steps) bits a scalar and gives every mask on the way. True stores the full order, in 4
        bytes a scalar; False none.
        `full`: also store a digest of all base weights, read at the first save, which detects a base that differs
        anywhere.
        Of a model that FSDP2 shards, all processes save together, and the first of them writes the file.
        Raises ConfigError, NothingTrainedError, NonFiniteError or IntegrityError before a file is touched.
        """
        delta = self.delta(base=base, info=info, old_values=old_values, order=order, allow_empty=allow_empty, full=full)
        return written_by_first(delta.save, path) if self.sharded else delta.save(path)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The run between two steps, {"info": JSON values, "tensors": {key: tensor}}: O(B), and the whole tensors.

        With this and the optimizer's own state dict a run continues bit for bit. Raises TunerError within a step.
        """
        self.model  # noqa: B018
        refuse_away(self.engine.tracker, "The state of the run is taken")
        return state.state_of(self.engine)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from `state_dict()`: on a fresh base attached the same way, or at another step of this run.

        Bit for bit, if the optimizer loads its own state. Raises ConfigError for the state of another run or one
        whose parts do not fit, BaseMismatchError for another base, and TunerError within a step; then nothing changes.
        """
        self.model  # noqa: B018
        refuse_away(self.engine.tracker, "The state of a run is loaded")
        state.load_into(self.engine, state_dict)

    @torch.no_grad()
    def detach(self) -> None:
        """Takes the tuner off: the model is the base again, bit for bit, and trainable as it was before."""
        self.model  # noqa: B018  (raises once the tuner is off)
        self._on.close()
        self._model = None

    @torch.no_grad()
    def _weights_loaded(self, module: nn.Module, incompatible: Any) -> None:
        now = dict(self.model.named_parameters(remove_duplicate=False))
        moved = self.engine.base.replaced(now) + self.engine.base.moved(self.model, self.engine.ledger)
        if moved:
            raise IntegrityError(
                f"load_state_dict changed {len(moved)} tensors outside the support: {some(moved)}. To "
                "continue a run, load the tuner's state before its weights (selectune.integrations does, for "
                "accelerate, Lightning and the Trainer). Load other weights before attach or after detach."
            )
        self.engine.tracker.weights_changed()

    def __deepcopy__(self, memo: Any) -> copies.CopiedTuner:
        return copies.CopiedTuner()

    def __reduce__(self) -> Any:
        return copies.CopiedTuner, ()

    def __repr__(self) -> str:
        packed = self.engine.base.quantised
        total = sum(
            packed.get(key, p).numel() for key, p in {id(p): p for p in self.engine.base.objects.values()}.items()
        )
        share = f"{self.trained:,} of {total:,} scalars ({100 * self.trained / max(1, total):.2f} %)"
        return f"Tuner({self.method.name}, selected {self.selected:,} of {self.budget:,}, step {self.step}; {share})"


def tuner_of(model: nn.Module) -> Tuner | None:
    """The tuner that a model or a part of it carries; None without one, and for a copy of a model with one.

    >>> import copy, torch, selectune as st
    >>> model = torch.nn.Linear(8, 4)
    >>> tuner = st.attach(model, st.id3(budget=6, steps=3))
    >>> st.tuner_of(model) is tuner, st.tuner_of(copy.deepcopy(model))
    (True, None)
    """
    return copies.owner_of(model)
