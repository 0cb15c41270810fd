"""Shared by the tests of deltas: models of plain tensors, random bits, a second packer for hostile files."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from selectune.delta import Delta, Dense, Patch, base_info

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
LAYOUTS = ["contiguous", "transposed", "strided", "channels_last"]
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Bag(nn.Module):
    """A model that is nothing but its tensors."""

    def __init__(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]  # type: ignore[assignment]
            module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
        for name, tensor in (buffers or {}).items():
            self.register_buffer(name, tensor)


def bits_of(tensor: Tensor) -> list[int]:
    """The tensor's bits in row-major order, without the package's help."""
    flat = tensor.detach().reshape(-1).contiguous()
    return flat.view(INTS[flat.element_size()]).tolist()


def snapshot(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Every parameter and buffer, in bits."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (t.dtype, tuple(t.shape), t.stride(), bits_of(t)) for name, t in named}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits at all: NaN payloads, infinities, denormals, -0.0."""
    source = torch.Generator().manual_seed(seed)
    count = max(1, torch.Size(shape).numel()) * dtype.itemsize
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=source)
    return data.view(dtype)[: torch.Size(shape).numel()].reshape(shape)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory order, where the shape allows it."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.clone(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.clone().transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and tensor.dim() >= 1:
        wide = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1))
        wide[..., : 2 * tensor.shape[-1] : 2].view(INTS[tensor.element_size()]).copy_(
            tensor.view(INTS[tensor.element_size()])
        )
        return wide[..., : 2 * tensor.shape[-1] : 2]
    return tensor.clone()


def finite(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Finite values with zeros of both signs among them."""
    source = torch.Generator().manual_seed(seed)
    values = (torch.randn(count, generator=source) * 4).to(dtype)
    values[::3] = -0.0
    values[1::7] = 0.0
    return values


def subset(numel: int, count: int, seed: int) -> Tensor:
    """`count` of `numel` flat positions, rising."""
    source = torch.Generator().manual_seed(seed)
    return torch.randperm(numel, generator=source)[:count].sort().values


def make_delta(
    model: nn.Module,
    support: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    *,
    dense: Mapping[str, Tensor] | None = None,
    old_values: bool = False,
    order: bool = False,
    info: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> Delta:
    """A delta on `model` that writes `values` at `support` and `dense` tensors whole."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    buffers = dict(model.named_buffers())
    patches, rank = [], 0
    for name, indices in support.items():
        whole = tensors[name].detach()
        old = whole.reshape(-1)[indices]
        ranks = torch.arange(rank, rank + len(indices), dtype=torch.int32).flip(0) if order else None
        rank += len(indices)
        patches.append(
            Patch.make(name, tuple(whole.shape), indices, values[name], old, old_values=old_values, order=ranks)
        )
    whole_ones = [
        Dense.make(name, "buffer" if name in buffers else "parameter", new, tensors[name], old_values=old_values)
        for name, new in (dense or {}).items()
    ]
    return Delta(patches, whole_ones, {**(info or {}), "base": base or base_info(model)})


def small() -> tuple[Bag, Delta]:
    """A small model and a delta on it with every kind of stream."""
    model = Bag(
        {
            "layer.weight": torch.arange(24.0).reshape(4, 6),
            "layer.bias": torch.ones(4, dtype=torch.bfloat16),
            "head": torch.ones(3),
        },
        {"count": torch.tensor(3)},
    )
    delta = make_delta(
        model,
        {"layer.weight": torch.tensor([1, 2, 23]), "layer.bias": torch.tensor([3])},
        {
            "layer.weight": torch.tensor([-0.0, 7.0, 8.0]),
            "layer.bias": torch.tensor([2.0], dtype=torch.bfloat16),
        },
        dense={"head": torch.tensor([1.0, 2.0, 3.0]), "count": torch.tensor(9)},
        old_values=True,
        order=True,
        info={
            "method": {"name": "id3", "exp": 2.0, "steps": 10, "scope": ["*"]},
            "budget": 4,
            "versions": {},
        },
    )
    return model, delta


# --- hostile files ---


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def open_up(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The metadata, the header's tensor entries in order, and the payload."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header.pop("__metadata__")["selectune"])
    return metadata, header, data[8 + length :]


def sealed(metadata: Mapping[str, Any]) -> str:
    """The metadata as a string, with a digest that fits."""
    rest = {key: value for key, value in metadata.items() if key != "digest"}
    return canonical({**rest, "digest": hashlib.sha256(canonical(rest).encode()).hexdigest()})


def close_up(text: str, entries: Any, payload: bytes) -> bytes:
    """A file from a metadata string (or any `__metadata__`), entries and payload, in safetensors layout."""
    meta = {"selectune": text} if isinstance(text, str) else text
    body = (
        entries
        if isinstance(entries, str)
        else ",".join(
            f'{json.dumps(key)}:{{"dtype":{json.dumps(e["dtype"])},"shape":{canonical(e["shape"])},'
            f'"data_offsets":{canonical(e["data_offsets"])}}}'
            for key, e in entries.items()
        )
    )
    header = f'{{"__metadata__":{canonical(meta)}{"," if body else ""}{body}}}'.encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + payload


def edited(data: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with edited metadata and a new digest of it, so that the checks after the digest are reached."""
    metadata, entries, payload = open_up(data)
    edit(metadata)
    return close_up(sealed(metadata), entries, payload)


def repacked(data: bytes, key: str, stream: bytes, **entry: Any) -> bytes:
    """The file with one stream's bytes replaced (same length) and its digest made right."""
    metadata, entries, payload = open_up(data)
    begin, end = entries[key]["data_offsets"]
    assert len(stream) == end - begin
    metadata["digests"][key] = hashlib.sha256(stream).hexdigest()
    entries[key] |= entry
    return close_up(sealed(metadata), entries, payload[:begin] + stream + payload[end:])


def stream_of(data: bytes, key: str) -> bytes:
    _, entries, payload = open_up(data)
    begin, end = entries[key]["data_offsets"]
    return payload[begin:end]


def mutated(value: Any, source: random.Random) -> Any:
    """A copy of some JSON with one node, or one key, replaced by something odd."""
    odd = [None, True, -1, 0, 1, 2**31, 2**63, 1e300, 0.5, "", "F64", "x" * 600, [], [[]], {}, {"a": 1}, [0] * 20]
    if isinstance(value, dict) and value and source.random() < 0.8:
        key = source.choice(sorted(value))
        if source.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated(value[key], source)}
    if isinstance(value, list) and value and source.random() < 0.85:
        at = source.randrange(len(value))
        if source.random() < 0.15:
            return value[:at] + value[at + source.randrange(2) :] + value[at : at + 1]
        return [*value[:at], mutated(value[at], source), *value[at + 1 :]]
    if type(value) is int and source.random() < 0.5:
        return value + source.choice([-1, 1])
    return source.choice(odd)
