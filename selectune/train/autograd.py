"""The nodes of the autograd graph that stand between the weights and the one trainable vector.

    values (B,) --Split--> pieces (n_j,) --SparseLinear | SparseEmbedding | Tap--> the loss

Forward, the pieces carry no numbers: the weights hold the values in place. Backward, every node turns
its gradient into the gradient of its piece, at the support only, and Split gathers the pieces'
gradients into one (B,) gradient. Dense gradients are formed only for a listener that wants them, and
live no longer than its `offer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from selectune import ops
from selectune.train.ledger import Page, Spots
from selectune.train.rebuild import rebuilt, source


class Listener(Protocol):
    """What the nodes tell whoever selects."""

    def wants_dense(self) -> bool:
        """Whether this backward pass shall show dense gradients."""
        ...

    def offer(self, index: int, gradient: Tensor, rows: Tensor | None = None) -> None:
        """The dense gradient of tensor `index`, or of the given rows of it when all others are 0.

        Its memory is used again for the next tensor: what shall outlive the call is copied.
        """
        ...

    def watch(self, index: int, spots: Spots, piece: Tensor) -> None:
        """The gradient (w,) of watched entries of tensor `index`."""
        ...

    def close(self, pages: Sequence[Page], pieces: Sequence[Tensor | None]) -> Tensor:
        """Ends a backward pass: the gradient (B,) out of the gradients of the pieces."""
        ...


@dataclass(frozen=True)
class Link:
    """One tensor in one graph: its number, its entries when the graph was built, and who listens."""

    index: int
    page: Page
    listener: Listener


class Split(torch.autograd.Function):
    """values (B,) -> one piece (n_j,) per tensor. Its backward runs when every tensor is done."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, pages: Sequence[Page], listener: Listener) -> tuple[Tensor, ...]:
        ctx.pages, ctx.listener = pages, listener
        ctx.set_materialize_grads(False)
        return tuple(values.new_empty(page.flat.numel()) for page in pages)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *pieces: Tensor | None) -> tuple[Tensor, None, None]:
        ops.end_pass()
        return ctx.listener.close(ctx.pages, pieces), None, None


class Tap(torch.autograd.Function):
    """Any use of a weight: forward the weight itself, backward a gather from the dense gradient."""

    @staticmethod
    def forward(ctx: Any, piece: Tensor, weight: Tensor, link: Link) -> Tensor:
        ctx.link, ctx.wide, ctx.home = link, piece.dtype, piece.device
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        page = ctx.link.page
        piece = ops.gather_entries(gradient, page.flat)
        if page.watched is not None:
            seen = ops.gather_entries(gradient, page.watched.flat)
            ctx.link.listener.watch(ctx.link.index, page.watched, seen)
        if ctx.link.listener.wants_dense():
            ctx.link.listener.offer(ctx.link.index, gradient)
        return piece.to(ctx.home, ctx.wide), None, None


class SparseLinear(torch.autograd.Function):
    """y = x W^T + b; the gradient of W only at its support, or dense on a selecting step.

    x is saved, unless the node that made it can make it again (`rebuild`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, piece: Tensor, weight: Tensor, bias: Tensor | None, link: Link) -> Tensor:
        ctx.link, ctx.wide = link, piece.dtype
        ctx.source = source(x)
        ctx.save_for_backward(x if ctx.source is None else None, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x = rebuilt(ctx.source) if x is None else x
        page, listener = ctx.link.page, ctx.link.listener
        dx = piece = dbias = None
        with torch.autocast(dy.device.type, enabled=False):
            flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
            if ctx.needs_input_grad[0]:
                dx = dy @ weight.to(dy.dtype)
            if ctx.needs_input_grad[3]:
                dbias = flat_dy.sum(0)
            if listener.wants_dense():
                dense = ops.weight_gradient(flat_dy, flat_x)
                piece = dense.view(-1)[page.flat]
                listener.offer(ctx.link.index, dense)
            else:
                piece = ops.sampled_matmul(flat_dy, flat_x, *page.coordinates(weight.shape[-1]))
            if page.watched is not None:
                seen = ops.sampled_matmul(flat_dy, flat_x, *page.watched.coordinates(weight.shape[-1]))
                listener.watch(ctx.link.index, page.watched, seen)
        return dx, piece.to(ctx.wide), None, dbias, None


class SparseEmbedding(torch.autograd.Function):
    """Rows of a table; the gradient of the table only at its support, or only of the rows that occur."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, piece: Tensor, table: Tensor, padding: int, link: Link) -> Tensor:
        ctx.link, ctx.padding, ctx.wide = link, padding, piece.dtype
        ctx.save_for_backward(ids)
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        ids, dy = ids.reshape(-1).long(), dy.reshape(-1, dy.shape[-1])
        if ctx.padding >= 0:
            ids = ids.masked_fill(ids == ctx.padding, -1)
        page = ctx.link.page
        piece = ops.sampled_rows(dy, ids, *page.coordinates(dy.shape[-1]))
        if page.watched is not None:
            seen = ops.sampled_rows(dy, ids, *page.watched.coordinates(dy.shape[-1]))
            ctx.link.listener.watch(ctx.link.index, page.watched, seen)
        if ctx.link.listener.wants_dense():
            rows, block = ops.row_sums(dy, ids)
            ctx.link.listener.offer(ctx.link.index, block, rows)
        return None, piece.to(ctx.wide), None, None, None
