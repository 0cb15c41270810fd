"""The proof that nothing but the support moved: checksums and copies of the base, and what differs from them now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selectune import ops
from selectune.bits import same_bits
from selectune.errors import IntegrityError, some
from selectune.quantised import quantised_weights
from selectune.scope import Found, ScopedTensor, is_own
from selectune.train.support.ledger import Ledger
from selectune.train.support.shards import Shards


@dataclass(frozen=True)
class Verification:
    """The result of `Tuner.verify`: counts of scalars. `changed` ones differ from the base in their bits."""

    changed: int
    selected: int
    touched: int
    budget: int
    dense: int
    tensors: int
    zeroed: int = 0  # entries outside the support that the method's fill set to 0


class BaseCopy:
    """What is needed to find and undo changes: a checksum per frozen tensor, copies of whole tensors and buffers."""

    def __init__(self, model: nn.Module, found: Found, shards: Shards) -> None:
        self.shards = shards
        self.scoped = {id(t.parameter): t for t in found.tensors}
        self.whole = {t.name: t.weight.clone() for t in found.whole}
        whole = {id(t.parameter) for t in found.whole}
        self.quantised = quantised_weights(model)
        self.sums = self._sums({n: p for n, p in model.named_parameters() if id(p) not in whole})
        self.buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        self.filled: dict[str, Tensor] = {}
        self.objects = dict(model.named_parameters(remove_duplicate=False))
        self.digests: dict[str, str] = {}  # of the base's tensors, computed on request

    def _sums(self, named: Mapping[str, nn.Parameter]) -> dict[str, int]:
        """Checksums of frozen tensors: of all that is stored of a quantised one, and of the whole of a sharded one."""
        plain = {name: parameter for name, parameter in named.items() if id(parameter) not in self.quantised}
        sums = self.shards.checksums(plain)
        return {name: sums[name] if name in sums else self._packed(parameter) for name, parameter in named.items()}

    def _packed(self, parameter: nn.Parameter) -> int:
        parts = sorted(self.quantised[id(parameter)].stored.parts.items())
        return sum(ops.checksum(part) * (2 * at + 1) for at, (_, part) in enumerate(parts))

    @torch.no_grad()
    def zero_unselected(self, model: nn.Module, ledger: Ledger) -> None:
        """Sets the scope to 0 outside the support and keeps a copy of it; no entry may be trained yet."""
        self.filled = {t.name: t.weight.clone() for t in self.scoped.values()}
        for tensor in self.scoped.values():
            page = ledger.pages[tensor.index]
            tensor.parameter.zero_()
            ledger.store.write(tensor.index, page.flat, page.base)
        names = {id(p): n for n, p in model.named_parameters()}
        self.sums |= {names[id(t.parameter)]: ops.checksum(t.parameter) for t in self.scoped.values()}

    def hold(self, tensors: Sequence[ScopedTensor], ledger: Ledger) -> None:
        """Keeps copies of the base of tensors in scope, which a dense phase is about to train."""
        for tensor in tensors:
            self.whole[tensor.name] = ledger.store.base(tensor.index, ledger.pages[tensor.index])

    def held(self, tensor: ScopedTensor) -> Tensor:
        """The kept base of a tensor, on its weight's device."""
        copy = self.whole[tensor.name]
        if copy.device != tensor.parameter.device:
            copy = self.whole[tensor.name] = copy.to(tensor.parameter.device)
        return copy

    def release(self, tensors: Sequence[ScopedTensor]) -> None:
        for tensor in tensors:
            self.whole.pop(tensor.name, None)

    def check(self, model: nn.Module, ledger: Ledger) -> None:
        """Raises IntegrityError if a parameter joined, left or was replaced, or a frozen entry moved."""
        self.shards.rest()
        now = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not is_own(n)}
        joined, gone = sorted(now.keys() - self.objects.keys()), sorted(self.objects.keys() - now.keys())
        replaced = self.replaced(now)
        if joined:
            raise IntegrityError(
                f"{len(joined)} parameters joined the model after attach: {some(joined)}. The tuner neither trains "
                "nor saves them, so the delta would be incomplete. Build the complete model first, then attach; "
                "Scope(train_fully=...) trains a new head in full."
            )
        if replaced or gone:
            what = "were replaced by other Parameters" if replaced else "left the model"
            raise IntegrityError(
                f"{len(replaced or gone)} parameters {what} since attach: {some(replaced or gone)}. The tuner trains "
                "the old ones. Change the model first (resize embeddings, add heads), then attach."
            )
        moved = self.moved(model, ledger)
        if moved:
            raise IntegrityError(
                f"{len(moved)} tensors changed outside the support since attach: {some(moved)}. Something other than "
                "the tuner wrote into the frozen weights: load_state_dict, an optimizer, or the model's own forward "
                "(exclude tensors that it writes: Scope(exclude=...))."
            )

    def replaced(self, now: Mapping[str, Tensor]) -> list[str]:
        """Names whose Parameter is another object than at attach."""
        return [name for name, parameter in self.objects.items() if name in now and now[name] is not parameter]

    def moved(self, model: nn.Module, ledger: Ledger) -> list[str]:
        """Names of tensors whose untouched entries differ from the base."""
        moved = []
        names = [name for name in self.sums if name not in self.whole]
        for name, now in self._sums({name: self.objects[name] for name in names}).items():
            tensor = self.scoped.get(id(self.objects[name]))
            if tensor is not None and tensor.quantised is None:
                flat, base = ledger.pages[tensor.index].touched()
                now += ops.checksum(base, flat) - ops.checksum(ledger.store.read(tensor.index, flat), flat)
            if (now - self.sums[name]) % (1 << 64):
                moved.append(name)
        return moved

    def changed_buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """Persistent buffers that differ from the base (batch-norm statistics, say)."""
        persistent = set(model.state_dict().keys())
        now = dict(model.named_buffers())
        return {
            n: now[n].detach()
            for n, old in self.buffers.items()
            if n in persistent and n in now and not same_bits(old, now[n])
        }

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name, before in self.whole.items():
            parameters[name].copy_(before)
        for tensor in self.scoped.values():
            if tensor.name in self.filled:
                tensor.parameter.copy_(self.filled[tensor.name])
        self.restore_buffers(model)

    @torch.no_grad()
    def restore_buffers(self, model: nn.Module) -> None:
        for name, buffer in model.named_buffers():
            old = self.buffers.get(name)
            if old is not None and not same_bits(old, buffer):
                buffer.copy_(old)


def overwritten(names: Sequence[str]) -> str:
    """The message about selected weights that differ from what the tuner wrote."""
    return (
        f"Selected weights of {len(names)} tensors are not what the tuner wrote: {some(names)}. Something else writes "
        "them too, such as a clamp in the model's own forward, so the model does not compute with the trained values. "
        "Exclude these tensors from the scope: Scope(exclude=...)."
    )
