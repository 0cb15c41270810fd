"""Weights that FSDP2 (`fully_shard`) shards: each rank holds some rows of a tensor, and the whole of it in a pass.

Entries keep the flat indices of the whole tensor everywhere, so supports, deltas and states do not depend on how many
ranks there are. A rank reads and writes the entries in its own part. What a rank reads of the others' parts comes by
a collective, so all ranks read the same at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selectune import internals, ops
from selectune.bits import flat_view
from selectune.errors import ScopeError, TunerError, some
from selectune.internals import FsdpWeight, is_sharded, part_of
from selectune.scope import Found, ScopedTensor, plain
from selectune.seeds import signed

_PIECE = 1 << 20  # entries whose places are listed at once


class Part:
    """The rows of one weight that this rank holds: entries `first` to `end` of the flat tensor."""

    def __init__(self, held: FsdpWeight, group: Any) -> None:
        self._held, self._group = held, group
        self.parameter = held.parameter
        mesh, rows = cast(Any, self.parameter).device_mesh, self.parameter.shape[0]
        width = self.parameter.numel() // max(1, rows)
        self._ranks: list[int] = mesh.mesh.tolist()  # in the order of their rows
        self._size = -(-rows // len(self._ranks)) * width
        self.first = min(mesh.get_local_rank() * self._size, self.parameter.numel())
        self.end = self.first + self.local.numel()

    @property
    def used(self) -> nn.Parameter:
        """The whole parameter, which modules hold in a pass; between two passes it has no memory."""
        return cast(nn.Parameter, self._held.used)

    @property
    def local(self) -> Tensor:
        """The rows that this rank holds, as a plain tensor."""
        return part_of(self.parameter)

    def now(self) -> Tensor | None:
        """The whole tensor, if a pass has it in memory."""
        return plain(self.used) if self._held.is_whole else None

    def whole(self) -> Tensor:
        """A copy of the whole tensor, gathered from all ranks."""
        mine = self.local.reshape(-1)
        padded = mine.new_zeros(self._size)
        padded[: mine.numel()] = mine
        parts = [torch.empty_like(padded) for _ in self._ranks]
        dist.all_gather([part.view(torch.uint8) for part in parts], padded.view(torch.uint8), group=self._group)
        return torch.cat([parts[rank] for rank in self._ranks])[: self.parameter.numel()].view(self.parameter.shape)

    def read(self, flat: Tensor) -> Tensor:
        """Entries (n,), bit by bit, from the ranks that hold them."""
        inside = self._inside(flat)
        numbers = flat_view(self.local)
        sent = torch.zeros(flat.shape, dtype=torch.int64 if numbers.element_size() == 8 else torch.int32)
        sent = sent.to(numbers.device)
        sent[inside] = numbers[flat[inside] - self.first].to(sent.dtype)
        dist.all_reduce(sent, group=self._group)  # all other ranks add 0
        return sent.to(numbers.dtype).view(self.parameter.dtype)

    def write(self, flat: Tensor, values: Tensor) -> None:
        """Makes those of the entries that this rank holds these values (n,); all of them where a pass has the whole."""
        inside, local, whole = self._inside(flat), self.local, self.now()
        ops.scatter_entries(local, flat[inside] - self.first, values[inside].to(local))
        if whole is not None:
            ops.scatter_entries(whole, flat, values.to(local).to(whole))

    def checksum(self) -> int:
        """This rank's share of `ops.checksum` of the whole tensor; the shares add up to it."""
        total, local = 0, self.local.reshape(-1)
        for start in range(0, local.numel(), _PIECE):
            piece = local[start : start + _PIECE]
            places = torch.arange(piece.numel(), device=piece.device) + (self.first + start)
            total += ops.checksum(piece, places)
        return total

    def _inside(self, flat: Tensor) -> Tensor:
        return (flat >= self.first) & (flat < self.end)


@dataclass(frozen=True)
class ShardedTensor(ScopedTensor):
    """A tensor in scope that FSDP2 shards."""

    part: Part = field(kw_only=True)

    @property
    def used(self) -> nn.Parameter:
        return self.part.used

    @property
    def weight(self) -> Tensor:
        """The whole tensor: as a pass has it in memory, or gathered from all ranks, which ask together.

        In a pass of lower precision it is gathered too, because entries are scored by the numbers that are kept.
        """
        now = self.part.now()
        return self.part.whole() if now is None or now.dtype != self.parameter.dtype else now

    @property
    def form(self) -> Tensor:
        return self.parameter


class Shards:
    """The parts of a model's weights; none for a model that is not sharded."""

    def __init__(self, model: nn.Module) -> None:
        self._units = internals.fsdp_modules(model)
        self._parts: dict[int, Part] = {}
        self.rest()
        _refuse(model)
        if not self._units:
            return
        self._group = dist.new_group()  # of our own, so that nothing of ours meets another's collective
        for module in self._units:
            weights = internals.fsdp_weights(module)
            if any(held.used is None for held in weights):
                module.unshard()  # makes the parameters that passes will use
                module.reshard()
            self._parts |= {id(held.parameter): Part(held, self._group) for held in weights}

    def __bool__(self) -> bool:
        return bool(self._parts)

    @property
    def averages(self) -> bool:
        """Whether the next backward pass ends with averaged gradients, as the model's user has said to FSDP2."""
        return all(internals.fsdp_syncs(module) for module in self._units)

    def rest(self) -> None:
        """Between two passes: modules hold their sharded parameters again, and whole ones have no memory."""
        for module in self._units:
            module.reshard()

    def within(self, found: Found) -> Found:
        """The same tensors, of which the sharded ones know their parts. Raises ScopeError if one is trained whole."""
        whole = [t.name for t in found.whole if id(t.parameter) in self._parts]
        if whole:
            raise ScopeError(
                f"{len(whole)} tensors that are trained whole are sharded: {some(whole)}. Leave them out of the "
                "shards: fully_shard(model, ignored_params=set(model.classifier.parameters())), for example."
            )
        return Found(tuple(self._scoped(tensor) for tensor in found.tensors), found.whole)

    def _scoped(self, tensor: ScopedTensor) -> ScopedTensor:
        part = self._parts.get(id(tensor.parameter))
        if part is None:
            return tensor
        return ShardedTensor(tensor.index, tensor.names, tensor.parameter, tensor.padding, tensor.transposed, part=part)

    def checksums(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """`ops.checksum` of whole tensors, by name."""
        parts = [self._parts.get(id(tensor)) for tensor in tensors.values()]
        sums = [
            ops.checksum(tensor.detach()) if part is None else part.checksum()
            for tensor, part in zip(tensors.values(), parts, strict=True)
        ]
        if any(parts):
            sums = self._added(sums, [part is not None for part in parts])
        return dict(zip(tensors, sums, strict=True))

    def _added(self, sums: Sequence[int], sharded: Sequence[bool]) -> list[int]:
        """The sums over all ranks of the shares, modulo 2^64."""
        home = next(iter(self._parts.values())).local.device
        found = torch.tensor([signed(total) for total in sums], device=home)
        dist.all_reduce(found, group=self._group)
        return [
            int(total) % (1 << 64) if shared else mine
            for total, mine, shared in zip(found.tolist(), sums, sharded, strict=True)
        ]


_INSTEAD = "Use fully_shard (FSDP2) over a mesh of one dimension that holds all processes, or DistributedDataParallel."


def refuse_zero(parameters: Iterable[Tensor]) -> None:
    """Raises TunerError if DeepSpeed's ZeRO-1 or ZeRO-2, which mark what they take, have flattened one of these."""
    if any(hasattr(parameter, "_hp_mapping") for parameter in parameters):
        raise TunerError(
            "DeepSpeed ZeRO-1 or ZeRO-2 has taken the model's parameters, which is not supported: they step on flat "
            "copies of what is trained, so a tuner would not see its steps. There is little for them to split, because "
            "gradients and optimizer state have one number for each selected entry. Use DistributedDataParallel, or "
            'DeepSpeed with "zero_optimization": {"stage": 0}. If the weights do not fit on one device, use '
            "fully_shard (FSDP2). A model that ZeRO had before keeps its marks: make it anew."
        )


def _refuse(model: nn.Module) -> None:
    """Raises TunerError for weights that are split between processes in another way than FSDP2 does by default."""
    modules = internals.fsdp_modules(model)
    known = {id(held.parameter): held for module in modules for held in internals.fsdp_weights(module)}
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise TunerError(f"The model runs inside FullyShardedDataParallel (FSDP1), which is not supported. {_INSTEAD}")
    refuse_zero(model.parameters())
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise TunerError(f'DeepSpeed ZeRO-3 splits the weight "{name}", which is not supported. {_INSTEAD}')
        if is_sharded(parameter):
            _refuse_part(name, cast(Any, parameter), known.get(id(parameter)))


def _refuse_part(name: str, parameter: Any, held: FsdpWeight | None) -> None:
    mesh, placements = parameter.device_mesh, parameter.placements
    if parameter.is_meta:
        raise ScopeError(
            f'The weight "{name}" is on the meta device: call model.to_empty(device=...), load its weights, and attach '
            "then."
        )
    rows = mesh.ndim == 1 and mesh.size() == dist.get_world_size() and placements[0].is_shard(0)
    if held is None or not rows:
        raise TunerError(
            f'The weight "{name}" is split between the processes in a way that is not supported: '
            f"{placements} over a mesh of {tuple(mesh.shape)}. {_INSTEAD}"
        )
    if held.offloaded:
        raise TunerError(
            "The weights are offloaded to the CPU (CPUOffloadPolicy), which is not supported. Call fully_shard without "
            "offload_policy."
        )
    if type(part_of(parameter)) is not Tensor:
        raise TunerError(
            f'The parts of the weight "{name}" are of the class {type(part_of(parameter)).__name__}, which is not '
            "supported. Shard plain tensors, without quantisation and without an all-gather in float8."
        )
