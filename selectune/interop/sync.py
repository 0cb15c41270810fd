"""A stream of patches from a run to servers of the model: O(B) a step, and no second copy of the weights.

    stream = selectune.sync.PatchStream(tuner)                # the trainer
    replica = selectune.sync.Replica(served)             # a server that holds the base
    ...
    optimizer.step()
    replica.apply(stream.update())                       # or to_bytes() and from_bytes(), over any wire

The trainer knows which entries it may have moved: those that the ledger lists now, and those that it listed at the last
update. Only these are read, compared with what was sent, and sent where their bits differ. Every update names the
version that it starts from and the one that it makes, so none is left out, repeated or written to another base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from selectune import bits
from selectune.bits import int_view
from selectune.delta import adapter_of, base_info, canonical_name, weights_digest
from selectune.errors import BaseMismatchError, ConfigError, DeltaStateError, some
from selectune.interop.patches import WeightPatch, WeightUpdate, cast, check, next_version, places, write
from selectune.train import Tuner
from selectune.train.saved.base_digests import base_of

__all__ = ["PatchStream", "Replica", "WeightPatch", "WeightUpdate"]


class Entries(NamedTuple):
    """Entries of one tensor that may differ from the base: places (n,) int64, rising, base values and values (n,)."""

    flat: Tensor
    base: Tensor
    values: Tensor


class Moved(NamedTuple):
    """The entries of one tensor that a server has to change: places (n,), new and old values (n,)."""

    flat: Tensor
    new: Tensor
    old: Tensor


def moved(sent: Entries | None, flat: Tensor, base: Tensor, read: Callable[[Tensor], Tensor]) -> tuple[Moved, Entries]:
    """What a server has to change, bit for bit, and what it then holds beside its base.

    `sent`: what it holds now. `flat`, `base`: the entries that may differ from the base now, with the base's values;
    all others hold the base's again. `read`: the present values at places (m,).

    >>> weight = torch.tensor([5.0, 6.0, 0.0])
    >>> sent = Entries(torch.tensor([0, 2]), torch.zeros(2), torch.tensor([5.0, 9.0]))
    >>> found, _ = moved(sent, torch.tensor([0, 1]), torch.zeros(2), lambda flat: weight[flat])
    >>> found.flat.tolist(), found.new.tolist(), found.old.tolist()
    ([1, 2], [6.0, 0.0], [0.0, 9.0])
    """
    every = flat if sent is None else torch.unique(torch.cat((sent.flat, flat)))
    values = read(every)
    held, mine = torch.zeros_like(values), torch.searchsorted(every, flat)
    int_view(held)[mine] = int_view(base)
    if sent is not None:  # what was sent stands above the base
        int_view(held)[torch.searchsorted(every, sent.flat)] = int_view(sent.values)
    differs = (int_view(held) != int_view(values)).nonzero().reshape(-1)
    now = int_view(values)[mine].view(values.dtype)
    return Moved(every[differs], _at(values, differs), _at(held, differs)), Entries(flat, base, now)


def _at(values: Tensor, where: Tensor) -> Tensor:
    return int_view(values)[where].view(values.dtype)


class PatchStream:
    """The trainer's side: each `update` leads from the weights that were sent last to the present ones.

    `names`: {parameter: its name at the server}; the same by default. `dtype`: that of the served weights; a value that
    it would round is refused. It keeps 16 bytes a scalar in fp32, and reads all weights once, for the base's version.

    Raises ConfigError for a run whose weights are no sparse change of the base's own tensors: with an adapter on the
    model, or with a method that sets unselected entries to 0.

    >>> import copy, selectune as st
    >>> model = nn.Linear(8, 4)
    >>> replica = Replica(copy.deepcopy(model))
    >>> tuner = st.attach(model, st.pafi(budget=6))
    >>> stream = PatchStream(tuner)
    >>> optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    >>> model(torch.ones(1, 8)).sum().backward()
    >>> optimizer.step()
    >>> replica.apply(stream.update())
    >>> torch.equal(replica.model.weight, model.weight), replica.version == stream.version
    (True, True)
    """

    def __init__(self, tuner: Tuner, names: Mapping[str, str] | None = None, dtype: torch.dtype | None = None) -> None:
        engine = tuner.engine
        if any(t.quantised is not None for t in engine.found.tensors):
            raise ConfigError("The offsets lie beside quantised weights, and a patch replaces values, so none is sent.")
        if adapter_of(tuner.model) is not None or tuner.method.fill != "keep":
            raise ConfigError(
                f"{tuner.method.name} on this model changes more than selected entries of the base's own tensors, so a "
                "server of the base cannot follow it by patches."
            )
        self.tuner, self.names, self.dtype = tuner, dict(names or {}), dtype
        described = {**base_info(tuner.model), "initialised": []}
        weights = base_of(tuner.model, engine.ledger, engine.base, described, True)["weights"]
        self.base = self.version = weights[:16]
        self._sent: dict[str, Entries] = {}
        trained = (*engine.found.tensors, *engine.found.whole)
        self._shapes = {canonical_name(t.name): tuple(t.parameter.shape) for t in trained}

    @torch.no_grad()
    def update(self) -> WeightUpdate:
        """What changed since the last update. Call it between two steps.

        Raises TunerError within a step, DeltaStateError while every entry is trained (a dense phase) or where a buffer
        changed, NonFiniteError for NaN or infinity, DeltaError for a value that the served dtype would round; the
        stream then stays where it was.
        """
        engine = self.tuner.engine
        engine.tracker.between_steps()
        if self.tuner.in_dense_phase:
            raise DeltaStateError("every entry is being trained now; there is no sparse update, so send the model")
        if buffers := list(engine.base.changed_buffers(self.tuner.model)):
            raise DeltaStateError(f"buffers changed, which a sparse update does not hold: {some(buffers)}")
        engine.tracker.write_weights()
        found, sent = {}, {}
        for name, flat, base, read in self._tensors():
            if name in self._sent or flat.numel():
                found[name], sent[name] = moved(self._sent.get(name), flat, base, read)
        made = self._update(found, self.version)
        self._sent, self.version = sent, made.target
        return made

    def catch_up(self) -> WeightUpdate:
        """From the base to what was sent last, for a server that joins late or has loaded the base again."""
        found = {name: Moved(sent.flat, sent.values, sent.base) for name, sent in self._sent.items()}
        made = self._update(found, self.base)
        return WeightUpdate(self.base, self.version, made.patches, made.before)

    def _tensors(self) -> Iterator[tuple[str, Tensor, Tensor, Callable[[Tensor], Tensor]]]:
        """(name, places that may differ from the base, base values there, how to read) of each tensor in scope."""
        engine = self.tuner.engine
        for tensor, page in zip(engine.found.tensors, engine.ledger.pages, strict=True):
            flat, base = page.touched()
            yield canonical_name(tensor.name), flat.cpu(), base.cpu(), partial(bits.gather, tensor.weight)
        for tensor in engine.found.whole:
            base = engine.base.whole[tensor.name].reshape(-1).cpu()
            yield canonical_name(tensor.name), torch.arange(base.numel()), base, partial(bits.gather, tensor.weight)

    def _update(self, found: Mapping[str, Moved], version: str) -> WeightUpdate:
        patches, before = [], []
        for name, (flat, new, old) in found.items():
            if not flat.numel():
                continue
            shape = self._shapes[name]
            at = places(name, flat, math.prod(shape))
            patches.append(WeightPatch(self.names.get(name, name), at, cast(name, new, self.dtype), shape))
            before.append(WeightPatch(self.names.get(name, name), at, old.to(self.dtype or old.dtype), shape))
        check(patches)
        return WeightUpdate(version, next_version(version, patches), tuple(patches), tuple(before))


class Replica:
    """A server's side: a plain model that follows a stream, each update written whole or refused.

    `version`: of the weights that it holds; by default they are read once and are taken for a base. `names`: {name in
    the updates: name in the model}; the same by default.
    """

    def __init__(self, model: nn.Module, version: str | None = None, names: Mapping[str, str] | None = None) -> None:
        self.model, self.names = model, dict(names or {})
        self.version = weights_digest(model)[:16] if version is None else version

    def apply(self, update: WeightUpdate) -> None:
        """Writes an update in place: O(B). `apply(update.reverse())` takes it back, bit for bit.

        Raises BaseMismatchError for an update that starts from another version or does not fit the model; nothing is
        written then.
        """
        if update.base != self.version:
            raise BaseMismatchError(
                f"the update leads from version {update.base} to {update.target}, and this model is at "
                f"{self.version}: one was left out, came twice, or is for another base. Ask for stream.catch_up()"
            )
        write(self.model, update.patches, self.names)
        self.version = update.target
