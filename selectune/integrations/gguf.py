"""GGUF: layers that read the blocks of a file, so that a base in 4 or 8 bits stays what it is on the disk.

    y = x dequantised(blocks)^T + b

Readers of GGUF make plain floats of the blocks, name them as the model does, and may change the order of rows. A layer
takes the blocks of the rows whose numbers are its own, to the bit, so this needs to know nothing of names and orders.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from selectune import quantised
from selectune.bits import raw
from selectune.errors import ConfigError, ModelError
from selectune.quantised import Stored

log = logging.getLogger("selectune")

PIECE = 1 << 20
"""So many entries of a weight are dequantised at once, at most."""

_PLAIN = ("F64", "F32", "F16", "BF16")


class BlockLinear(nn.Linear):
    """A linear layer whose weight (o, i) is rows of blocks (o, bytes), uint8, of a type of GGUF such as Q4_1."""

    def __init__(self, layer: nn.Linear, blocks: nn.Parameter, kind: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.weight, self.bias, self.training = blocks, layer.bias, layer.training

    def forward(self, input: Tensor) -> Tensor:
        where = input.device.type
        x = input.to(torch.get_autocast_dtype(where)) if torch.is_autocast_enabled(where) else input
        with torch.autocast(where, enabled=False):
            return _Product.apply(x, None if self.bias is None else self.bias.to(x.dtype), self)  # type: ignore[no-any-return]


class BlockEmbedding(nn.Embedding):
    """An embedding whose table is rows of blocks; a look-up dequantises the rows in use. It has no gradient."""

    def __init__(self, layer: nn.Embedding, blocks: nn.Parameter, kind: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.kind = layer.num_embeddings, layer.embedding_dim, kind
        self.padding_idx, self.max_norm, self.norm_type = layer.padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.weight, self.training = blocks, layer.training
        self.register_buffer("like", torch.empty(0, dtype=layer.weight.dtype), persistent=False)  # follows casts

    def forward(self, input: Tensor) -> Tensor:
        rows = self.weight.detach().index_select(0, input.reshape(-1))
        dtype = cast(Tensor, self.like).dtype
        return _numbers(rows, self.kind).to(dtype).view(*input.shape, self.embedding_dim)


class _Product(torch.autograd.Function):
    """x dequantised(blocks)^T + b, piece by piece; backward dequantises again and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: BlockLinear) -> Tensor:
        ctx.layer = layer
        if layer.out_features <= _rows(layer):
            y = F.linear(x, next(_pieces(layer))[1].to(x.dtype), bias)
            return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y  # may be changed in place
        y = x.new_empty(*x.shape[:-1], layer.out_features)
        for rows, part in _pieces(layer):
            y[..., rows] = F.linear(x, part.to(x.dtype), None if bias is None else bias[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = dbias = None
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                for rows, part in _pieces(ctx.layer):
                    product = dy[..., rows] @ part.to(dy.dtype)
                    dx = product if dx is None else dx.add_(product)
            if ctx.needs_input_grad[1]:
                dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, dbias, None


def _rows(layer: BlockLinear) -> int:
    """How many rows are dequantised at once."""
    return max(1, PIECE // layer.in_features)


def _pieces(layer: BlockLinear) -> Iterator[tuple[slice, Tensor]]:
    """The weight, some rows at a time."""
    blocks, step = layer.weight.detach(), _rows(layer)
    for start in range(0, layer.out_features, step):
        rows = slice(start, start + step)
        yield rows, _numbers(blocks[rows], layer.kind)


def keep_blocks(model: nn.Module, file: str | Path) -> int:
    """Puts the blocks of a GGUF file in place of the floats that were made of them; returns how many weights.

    `model` was loaded from `file` and dequantised, by transformers for example. Each weight of its linear layers and
    embeddings becomes the blocks that have its numbers, in its dtype and to the bit; a tied one stays tied. Weights
    that the file keeps as plain floats, or that came from elsewhere (a head that is drawn for the task), stay as they
    are. Dequantises the whole file once.

    Raises ConfigError if no weight of the model is found in the file, and ModelError if gguf is not installed.
    """
    wanted: dict[tuple[torch.Size, torch.dtype, bytes], list[_Place]] = {}
    for place in _places(model):
        wanted.setdefault((place.weight.shape, place.weight.dtype, _all(place.rows)), []).append(place)
    kept, dtypes = 0, {dtype for _, dtype, _ in wanted}
    for tensor in _packed(file):
        blocks, kind = torch.from_numpy(tensor.data.copy()), int(tensor.tensor_type)
        numbers = _numbers(blocks, kind)
        for dtype in dtypes:
            rows = _digests(numbers.to(dtype))
            for place in wanted.pop((numbers.shape, dtype, _all(rows)), ()):
                at = {row: i for i, row in enumerate(rows)}
                place.take(blocks[[at[row] for row in place.rows]], kind)
                kept += 1
    left = [place.name for places in wanted.values() for place in places if isinstance(place.layers[0][2], nn.Linear)]
    if not kept:
        raise ConfigError(
            f"No weight of the model has the numbers of a block of {file}. Load the model from this file, in float32 "
            "or a half precision, and keep its blocks before anything changes its weights."
        )
    log.info(
        "%d weights stay in the blocks of %s%s.", kept, Path(file).name,
        f"; {len(left)} linear layers have none there ({', '.join(left[:3])})" if left else "",
    )  # fmt: skip
    return kept


def bytes_of(file: str | Path) -> tuple[int, int]:
    """The bytes of a file's blocks, and how many numbers are in them. Reads the header only."""
    tensors = _packed(file)
    return sum(int(t.n_bytes) for t in tensors), sum(int(t.n_elements) for t in tensors)


def _packed(file: str | Path) -> list[Any]:
    """The matrices of a file that are blocks."""
    tensors = library().GGUFReader(str(file)).tensors
    return [t for t in tensors if t.tensor_type.name not in _PLAIN and t.data.ndim == 2]


class _Place:
    """A weight, and the layers that hold it: (parent, name, layer)."""

    def __init__(self, name: str, weight: nn.Parameter) -> None:
        self.name, self.weight, self.rows = name, weight, _digests(weight.detach())
        self.layers: list[tuple[nn.Module, str, nn.Linear | nn.Embedding]] = []

    def take(self, blocks: Tensor, kind: int) -> None:
        shared = nn.Parameter(blocks.to(self.weight.device), requires_grad=False)
        for parent, name, layer in self.layers:
            made = BlockLinear if isinstance(layer, nn.Linear) else BlockEmbedding
            setattr(parent, name, made(layer, shared, kind))  # type: ignore[arg-type]


def _places(model: nn.Module) -> list[_Place]:
    found: dict[int, _Place] = {}
    for path, parent in model.named_modules():
        for name, layer in parent.named_children():
            if type(layer) not in (nn.Linear, nn.Embedding) or not layer.weight.is_floating_point():  # type: ignore[operator, union-attr]
                continue
            weight: Any = layer.weight
            if id(weight) not in found:
                found[id(weight)] = _Place(f"{path}.{name}".lstrip("."), weight)
            found[id(weight)].layers.append((parent, name, layer))  # type: ignore[arg-type]
    return list(found.values())


def _digests(numbers: Tensor) -> list[bytes]:
    """16 bytes for each row of numbers."""
    rows = raw(numbers).reshape(numbers.shape[0], -1)
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]


def _all(rows: list[bytes]) -> bytes:
    """A digest of rows in any order."""
    return hashlib.blake2b(b"".join(sorted(rows)), digest_size=16).digest()


def _numbers(blocks: Tensor, kind: int) -> Tensor:
    """The numbers (o, i) of rows of blocks (o, bytes), in float32."""
    if (found := _by_torch()) is not None and kind in found.GGML_BLOCK:
        return found.dequantize(blocks, kind).view(blocks.shape[0], -1)  # type: ignore[no-any-return]
    gguf = library()
    numbers = gguf.quants.dequantize(blocks.cpu().numpy(), gguf.GGMLQuantizationType(kind))
    return torch.from_numpy(numbers).to(blocks.device)


@functools.cache
def _by_torch() -> Any:
    """What dequantises many types on any device, in newer versions of transformers; gguf does all by NumPy."""
    try:
        return importlib.import_module("transformers.integrations.gguf.dequant")
    except ImportError:
        return None


def library() -> Any:
    """The package gguf. Raises ModelError if it is not installed."""
    try:
        return importlib.import_module("gguf")  # once loaded, a look into a table: scores ask at every weight
    except ImportError as error:
        raise ModelError(
            "A GGUF file is read by the package gguf, which is not installed: pip install gguf."
        ) from error


def _blocks(module: nn.Module, parameter: nn.Parameter) -> Stored | None:
    if not isinstance(module, BlockLinear | BlockEmbedding) or parameter is not module.weight:
        return None
    blocks, kind = parameter.detach(), module.kind
    width = module.in_features if isinstance(module, BlockLinear) else module.embedding_dim
    shape = torch.Size((blocks.shape[0], width))
    name = library().GGMLQuantizationType(kind).name
    return Stored(f"gguf.{name}", shape, {"blocks": blocks}, lambda: _numbers(blocks, kind))


quantised.KINDS.append(_blocks)
