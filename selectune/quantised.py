"""Quantised weights: linear weights whose stored bits stay as they are, read as numbers when a score or a proof asks.

A kind of quantised weight is a function in `KINDS`: given a module and its parameter it says how the numbers are made
from what is stored, and what that is. Nothing here imports the library of a kind, since its weights bring it along.

    torchao        every tensor subclass of torchao: int8, intx, int4, float8
    bitsandbytes   Linear4bit (NF4, FP4) and Linear8bitLt (LLM.int8, arXiv:2208.07339)
    GGUF           blocks of every type, in the layers of `integrations.gguf`, which adds this kind
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from selectune.bits import dtype_name, raw
from selectune.errors import ConfigError

BESIDE = "_selectune_beside"
"""Where a module keeps the values beside its weight (`selectune.beside`): a key of its __dict__."""


@dataclass(frozen=True, eq=False)
class Stored:
    """What a quantised weight consists of: its kind with its settings, its shape, its tensors, and its numbers."""

    kind: str
    shape: torch.Size
    parts: Mapping[str, Tensor]
    dequantise: Callable[[], Tensor]  # (o, i) in float32 or a half precision
    hold: Callable[[], None] = lambda: None  # keeps the library from storing the weight anew


@dataclass(frozen=True, eq=False)
class Quantised:
    """One quantised parameter of a model, and the modules that hold it; offsets beside it are float32."""

    parameter: nn.Parameter
    shape: torch.Size
    owners: list[nn.Module] = field(default_factory=list)
    dtype: torch.dtype = torch.float32  # of offsets beside the weight

    @property
    def stored(self) -> Stored:
        """What is stored at present."""
        found = stored_in(self.owners[0], self.parameter)
        if found is None:
            raise TypeError("a quantised weight became another kind of tensor")
        return found

    @property
    def linear(self) -> bool:
        """Whether linear layers alone use it, so that a sparse part can be added to what they give."""
        return len(self.shape) == 2 and all(isinstance(owner, nn.Linear) for owner in self.owners)

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return sum(part.nbytes for part in self.stored.parts.values())

    def numel(self) -> int:
        """Number of entries of the weight."""
        return self.shape.numel()

    @torch.no_grad()
    def dequantise(self) -> Tensor:
        """The numbers of the stored weight, in memory of their own."""
        return self.stored.dequantise().contiguous()

    @torch.no_grad()
    def now(self) -> Tensor:
        """The numbers with the offsets that lie beside the weight at present, in memory of their own."""
        weight, side = self.dequantise(), self.owners[0].__dict__.get(BESIDE)
        if side is not None:
            flat, values = side.held
            weight.view(-1).index_add_(0, flat.to(weight.device), values.to(weight))
        return weight

    def hold(self) -> None:
        """Keeps the library from storing the weight in another layout, which would change its bits."""
        for owner in self.owners:
            if (found := stored_in(owner, self.parameter)) is not None:
                found.hold()

    def digest(self) -> str:
        """16 hex digits of sha256 over kind, shape and stored bits: one read of them."""
        now = self.stored
        found = hashlib.sha256(json.dumps([now.kind, list(now.shape)]).encode())
        for name, part in sorted(now.parts.items()):
            found.update(json.dumps([name, dtype_name(part.dtype), list(part.shape)]).encode())
            found.update(raw(part).data)
        return found.hexdigest()[:16]


def stored_in(module: nn.Module, parameter: nn.Parameter) -> Stored | None:
    """What a module's parameter stores if it is quantised; None for an ordinary one."""
    for kind in KINDS:
        found = kind(module, parameter)
        if found is not None:
            return found
    return None


def quantised_weights(model: nn.Module) -> dict[int, Quantised]:
    """{id of the parameter: the quantised weight} of a model."""
    found: dict[int, Quantised] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or (type(parameter) is nn.Parameter and parameter.is_floating_point()):
                continue
            if id(parameter) not in found:
                now = stored_in(module, parameter)
                if now is None:
                    continue
                found[id(parameter)] = Quantised(parameter, now.shape)
            found[id(parameter)].owners.append(module)
    return found


def _torchao(module: nn.Module, parameter: Any) -> Stored | None:
    del module
    if not _of("torchao", parameter) or not hasattr(parameter, "dequantize"):
        return None
    parts = dict(_flattened(parameter))
    return Stored(f"torchao.{type(parameter).__name__}", parameter.shape, parts, parameter.dequantize)


def _flattened(tensor: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The plain tensors of a tensor subclass, by name, at any depth."""
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if hasattr(part, "__tensor_flatten__"):
            yield from _flattened(part, f"{prefix}{name}.")
        else:
            yield prefix + name, part.detach()


def _four_bits(module: Any, parameter: Any) -> Stored | None:
    state = getattr(parameter, "quant_state", None)
    if not _of("bitsandbytes", parameter) or state is None:
        return None
    functional, facts = sys.modules["bitsandbytes"].functional, state.as_dict()
    parts = {name: fact for name, fact in facts.items() if isinstance(fact, Tensor)}
    settings = ",".join(str(facts[name]) for name in ("quant_type", "blocksize", "nested_blocksize") if name in facts)
    packed = parameter.detach().as_subclass(Tensor)

    def dequantise() -> Tensor:
        if getattr(state, "packing_format_for_cpu", False):
            raise ConfigError(
                "bitsandbytes has stored a 4-bit weight anew for this processor, as it does at a forward in eval mode, "
                "and rounded its scales. Load the model again, and attach or apply before the first such forward."
            )
        return functional.dequantize_4bit(packed, state)

    def hold() -> None:
        module.support_avx512bf16_for_cpu = False

    kind, shape = f"bitsandbytes.Params4bit({settings})", torch.Size(state.shape)
    return Stored(kind, shape, {"weight": packed, **parts}, dequantise, hold)


def _eight_bits(module: Any, parameter: Any) -> Stored | None:
    if not _of("bitsandbytes", parameter) or parameter.dtype != torch.int8:
        return None
    scales = getattr(parameter, "SCB", None)  # the first forward moves them into the module's state
    scales = module.state.SCB if scales is None else scales
    packed = parameter.detach().as_subclass(Tensor)
    return Stored(
        "bitsandbytes.Int8Params", packed.shape, {"weight": packed, "scales": scales},
        lambda: packed.float() * (scales.float() / 127).view(-1, 1),
    )  # fmt: skip


def _of(library: str, parameter: Any) -> bool:
    return type(parameter).__module__.partition(".")[0] == library


KINDS: list[Callable[[nn.Module, nn.Parameter], Stored | None]] = [_torchao, _four_bits, _eight_bits]
"""Each answers None for a parameter of another kind. A further kind is one more function."""
