"""Replacements for torch's functions of a weight that form its gradient at the support only.

A function returns NotImplemented if it cannot; the weight is then tapped, and its dense gradient exists for a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selectune.beside import Node, SideValues
from selectune.internals import in_transform
from selectune.quantised import Quantised
from selectune.train.graph.nodes import Link, SparseBeside, SparseEmbedding, SparseLayerNorm, SparseLinear
from selectune.train.graph.weights import SPARSE, Place, Use, Weight, tapped, use_of


def _instead_of(function: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def put(ours: Callable[..., Any]) -> Callable[..., Any]:
        SPARSE[function] = ours
        return ours

    return put


@_instead_of(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if in_transform() or weight.dim() != 2:
        return NotImplemented
    use, own = use_of(weight), use_of(bias)
    if use is None and (own is None or _trains(weight)):
        return NotImplemented
    x, weight, bias = tapped(input), _numbers(weight, use), _numbers(bias, own)
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype or x.is_nested:
        return NotImplemented
    piece, link = _counted(use, x)
    return SparseLinear.apply(x, piece, weight, link, bias, *_counted(own, x))


@_instead_of(F.layer_norm)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    parts = (weight, bias)
    uses = [use_of(part) for part in parts]
    if in_transform() or any(p is None or (u is None and _trains(p)) for p, u in zip(parts, uses, strict=True)):
        return NotImplemented
    if all(use is None for use in uses):
        return NotImplemented
    x, plain = tapped(input), [_numbers(part, use) for part, use in zip(parts, uses, strict=True)]
    one_type = all(p.dtype == x.dtype and p.device == x.device for p in plain)
    if len(normalized_shape) != 1 or not one_type or torch.is_autocast_enabled(x.device.type):
        return NotImplemented
    arguments: list[Any] = []
    for use, value in zip(uses, plain, strict=True):
        arguments += [value, *_counted(use, x)]
    return SparseLayerNorm.apply(x, eps, *arguments)


@_instead_of(F.embedding)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    use = use_of(weight)
    if use is None or max_norm is not None or scale_grad_by_freq or in_transform():
        return NotImplemented
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    use.count(rows=padding >= 0)
    return SparseEmbedding.apply(input, use.piece.to(input.device), use.weight, padding, use.link)


def beside(side: SideValues, weight: Quantised, place: Place) -> Node:
    """The node of a quantised weight: (input, output of its layer, layer) -> output with the values beside it.

    Without a bias the library's part of the graph is dropped, since some keep the dequantised weight until backward.
    """

    def node(x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        if not torch.is_grad_enabled():
            place.user.used_without_gradients()
            return side.added(x, output)
        use = place.user.use(place.index)
        if use is None or in_transform():
            return side.added(x, output)
        x = x.to(output.dtype)
        piece, link = _counted(use, x)
        alone = getattr(layer, "bias", None) is None
        mine = (output.detach(), weight) if alone else (output, None)
        return SparseBeside.apply(mine[0], x, piece, *side.coordinates(x.device), link, mine[1])

    return node


def _trains(part: Tensor | None) -> bool:
    """Whether a tensor that is no weight in scope needs a gradient of its own."""
    return part is not None and not isinstance(part, Weight) and part.requires_grad


def _numbers(part: Tensor | None, use: Use | None) -> Any:
    if use is not None:
        return use.weight
    return part.detach() if isinstance(part, Weight) else part


def _counted(use: Use | None, x: Tensor) -> tuple[Tensor | None, Link | None]:
    """Counts one more use, if any; returns its piece and its link."""
    if use is None:
        return None, None
    use.count()
    return use.piece.to(x.device), use.link
