"""The nodes of the autograd graph that stand between the weights and the one trainable vector.

    offsets (B,) --SplitOffsets--> pieces (n_j,) --SparseLinear | SparseEmbedding | SparseLayerNorm | Tap--> the loss

In forward the pieces carry no numbers, because the weights hold start + offset in place. In backward every node turns
its gradient into the gradient of its piece, at the support only, and SplitOffsets gathers these into one (B,)
gradient. Dense gradients are formed only if the listener wants them, and are dropped after its `offer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from selectune import bits, ops
from selectune.beside import product, with_product
from selectune.internals import saved_tensors_are_hooked
from selectune.quantised import Quantised
from selectune.train.graph.recompute import forget, rebuilt, source
from selectune.train.support.pages import Page, Spots
from selectune.train.support.rectangles import Rectangles


class Listener(Protocol):
    """What the nodes report to the tracker."""

    def wants_dense(self, link: Link) -> bool:
        """Whether this backward pass has to form dense gradients."""
        ...

    def offer(self, link: Link, gradient: Tensor, rows: Tensor | None = None) -> None:
        """Takes the dense gradient of a tensor, or of the given rows of it if all others are 0.

        The next tensor uses the same memory, so anything that is kept must be copied.
        """
        ...

    def offer_factors(self, link: Link, dy: Tensor, x: Tensor) -> tuple[bool, Tensor | None]:
        """A gradient dy^T x, (t, o) and (t, i): whether this was enough, and the gradient if it was formed."""
        ...

    def watch(self, link: Link, piece: Tensor) -> None:
        """Takes the gradient (w,) of a tensor's watched entries."""
        ...

    def close(self, pages: Sequence[Page], pieces: Sequence[Tensor | None]) -> Tensor:
        """Ends a backward pass; makes the gradient (B,) of the offsets from those of the pieces."""
        ...


@dataclass(frozen=True)
class Link:
    """One tensor in one graph: its number, its entries when the graph was made, the listener, and its uses.

    `stay`: from forward to backward all weights are in memory; FSDP2 frees them in between. `sparse`: no dense gradient
    will be asked for, so that a support of whole rows, columns or blocks needs a part of the input only.
    """

    index: int
    page: Page
    listener: Listener
    uses: list[int]  # per tensor: how many gradients are still expected
    split: Any  # the SplitOffsets node of this graph
    stay: bool = True
    sparse: bool = False

    def rectangles(self, width: int) -> Rectangles | None:
        """The support of a linear weight of this width, if small dense products give all that will be asked for."""
        return self.page.rectangles(width) if self.sparse and self.page.watched is None else None


class SplitOffsets(torch.autograd.Function):
    """offsets (B,) -> one piece (n_j,) per tensor. Its backward runs when every tensor is done."""

    @staticmethod
    def forward(ctx: Any, offsets: Tensor, pages: Sequence[Page], listener: Listener) -> tuple[Tensor, ...]:
        ctx.pages, ctx.listener = pages, listener
        ctx.set_materialize_grads(False)
        return tuple(offsets.new_empty(page.flat.numel()) for page in pages)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *pieces: Tensor | None) -> tuple[Tensor, None, None]:
        forget()
        return ctx.listener.close(ctx.pages, pieces), None, None


class Tap(torch.autograd.Function):
    """Any other use of a weight: forward gives the weight itself, backward gathers from its dense gradient.

    torch.func's vmap does not batch it, since the weight is the same for all; so it is made outside the transform.
    """

    @staticmethod
    def forward(piece: Tensor, weight: Tensor, link: Link) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        piece, _, ctx.link = inputs
        ctx.wide, ctx.home = piece.dtype, piece.device

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError("A weight in scope is not batched.")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        piece = _at_support(ctx.link, lambda spots: ops.gather_entries(gradient, spots.flat), lambda: gradient)
        return piece.to(ctx.home, ctx.wide), None, None


class Reach(torch.autograd.Function):
    """Connects an output to the offsets with a zero gradient, so that backward() works if no selected entry did."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, piece: Tensor) -> Tensor:
        return output.clone()  # not a view, so that it may be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class SparseLinear(torch.autograd.Function):
    """y = x W^T + b; the gradients of W and b only at their support, or dense on a selecting step.

    x is saved, or of a support of whole units what that needs of x, unless the node that made it can make it again
    (`recompute`). Without a link W is frozen; without a `bias_link` the bias is an ordinary tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, piece: Tensor | None, weight: Tensor, link: Link | None,
        bias: Tensor | None, bias_piece: Tensor | None, bias_link: Link | None,
    ) -> Tensor:  # fmt: skip
        ctx.link, ctx.bias_link, ctx.shape = link, bias_link, x.shape
        ctx.wide = (bias_piece if piece is None else piece).dtype  # type: ignore[union-attr]
        ctx.source = None if link is None else source(x, link.stay)
        ctx.save_for_backward(None if link is None or ctx.source is not None else _kept(link, x), weight)
        with torch.autocast(x.device.type, enabled=False):
            return _own(F.linear(x, weight.to(x.dtype), bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = piece = dbias = bias_piece = None
        with torch.autocast(dy.device.type, enabled=False):
            flat_dy = _rows(dy)
            if ctx.needs_input_grad[0]:
                dx = (flat_dy @ weight.to(dy.dtype)).view(ctx.shape)  # from flat_dy: a strided dy is copied once
            if ctx.needs_input_grad[4]:
                dbias = flat_dy.sum(0)
            if ctx.bias_link is not None:
                bias_piece = _at_support(
                    ctx.bias_link, lambda spots: ops.sampled_sum(flat_dy, spots.flat), lambda: flat_dy.sum(0)
                ).to(ctx.wide)
            if ctx.link is not None:
                x = _kept(ctx.link, rebuilt(ctx.source)) if x is None else x
                piece = _of_linear(ctx.link, flat_dy, _rows(x), ctx.shape[-1]).to(ctx.wide)
        return dx, piece, None, None, dbias, bias_piece, None


class SparseBeside(torch.autograd.Function):
    """y + x S^T: what a layer with a quantised weight gives, and the offsets S beside it.

    The gradient of S is that of the weight, dy^T x, at its support only, or dense on a selecting step. With `weight`
    the gradient of x includes the layer's, dy dequantised(W), and y gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, piece: Tensor, rows: Tensor, cols: Tensor, values: Tensor, link: Link,
        weight: Quantised | None,
    ) -> Tensor:  # fmt: skip
        ctx.weight = weight
        ctx.link, ctx.wide, ctx.shape, ctx.source = link, piece.dtype, x.shape, source(x)
        ctx.save_for_backward(_kept(link, x) if ctx.source is None else None, rows, cols, values)
        return with_product(output, x, rows, cols, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, cols, values = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            dx = product(dy, cols, rows, values, ctx.shape[-1]).to(dy.dtype) if ctx.needs_input_grad[1] else None
            if dx is not None and ctx.weight is not None:
                dx += (_rows(dy) @ ctx.weight.dequantise().to(dy.dtype)).view(ctx.shape)
            x = _kept(ctx.link, rebuilt(ctx.source)) if x is None else x
            piece = _of_linear(ctx.link, _rows(dy), _rows(x), ctx.shape[-1]).to(ctx.wide)
        return None if ctx.weight is not None else dy, dx, piece, None, None, None, None, None


class SparseLayerNorm(torch.autograd.Function):
    """Layer norm over the last dimension; gradients of weight and bias as in SparseLinear."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, eps: float, weight: Tensor, piece: Tensor | None, link: Link | None,
        bias: Tensor, bias_piece: Tensor | None, bias_link: Link | None,
    ) -> Tensor:  # fmt: skip
        ctx.eps, ctx.link, ctx.bias_link = eps, link, bias_link
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.kept_plain = not saved_tensors_are_hooked()
        return _own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        links = ctx.link, ctx.bias_link
        dense = any(link is not None and link.listener.wants_dense(link) for link in links)
        mask = [ctx.needs_input_grad[0], dense, dense]
        dx, *whole = torch.ops.aten.native_layer_norm_backward(dy, x, weight.shape, mean, rstd, weight, bias, mask)
        flat_dy, flat_x = _rows(dy), _rows(x)
        wide = bits.wide(x.dtype)

        def of_weight(spots: Spots) -> Tensor:
            normed = (flat_x[:, spots.flat].to(wide) - mean.view(-1, 1)) * rstd.view(-1, 1)
            return (flat_dy[:, spots.flat] * normed).sum(0)

        def of_bias(spots: Spots) -> Tensor:
            return ops.sampled_sum(flat_dy, spots.flat)

        pieces = [
            None if link is None else _at_support(link, sample, lambda k=k: whole[k])
            for k, (link, sample) in enumerate(zip(links, (of_weight, of_bias), strict=True))
        ]
        return dx, None, None, pieces[0], None, None, pieces[1], None


class SparseEmbedding(torch.autograd.Function):
    """Looks up rows of a table; its gradient is formed at the support, or on a selecting step for the rows in use."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, piece: Tensor, table: Tensor, padding: int, link: Link) -> Tensor:
        ctx.link, ctx.padding, ctx.wide = link, padding, piece.dtype
        ctx.save_for_backward(ids)
        return _own(F.embedding(ids, table))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        ids, dy = ids.reshape(-1).long(), _rows(dy)
        if ctx.padding >= 0:
            ids = ids.masked_fill(ids == ctx.padding, -1)
        piece = _at_support(ctx.link, lambda spots: ops.sampled_rows(dy, ids, *spots.coordinates(dy.shape[-1])))
        if ctx.link.listener.wants_dense(ctx.link):
            rows, block = ops.row_sums(dy, ids)
            ctx.link.listener.offer(ctx.link, block, rows)
        return None, piece.to(ctx.wide), None, None, None


def _rows(tensor: Tensor) -> Tensor:
    """Merges all dimensions but the last, even if one of them is 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _own(output: Tensor) -> Tensor:
    """An output that may be changed in place, which torch forbids for a view made by a Function."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def _kept(link: Link, x: Tensor) -> Tensor:
    """What the gradient of a linear weight needs of its input."""
    parts = link.rectangles(x.shape[-1])
    return x if parts is None else parts.kept(x)


def _of_linear(link: Link, dy: Tensor, x: Tensor, width: int) -> Tensor:
    """The gradient dy^T x of a linear weight (o, width) at its support (n,), for dy (t, o) and what was kept of x."""
    parts = link.rectangles(width)
    if parts is not None:
        return parts.gradient(dy, x)
    return _at_support(
        link,
        lambda spots: ops.sampled_matmul(dy, x, *spots.coordinates(x.shape[-1])),
        lambda: ops.weight_gradient(dy, x),
        (dy, x),
    )


def _at_support(
    link: Link,
    sample: Callable[[Any], Tensor],
    dense: Callable[[], Tensor] | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A tensor's gradient at its support; offers the dense one, and the watched entries', to the listener.

    `factors`: dy and x of a gradient dy^T x, which may be enough for the listener.
    """
    page, listener, whole = link.page, link.listener, None
    if dense is not None and listener.wants_dense(link):
        enough = False
        if factors is not None:
            enough, whole = listener.offer_factors(link, *factors)
        whole = dense() if whole is None and not enough else whole
        piece = sample(page) if whole is None else ops.gather_entries(whole, page.flat)
        if whole is not None and not enough:
            listener.offer(link, whole)
    else:
        piece = sample(page)
    if page.watched is not None:
        listener.watch(link, sample(page.watched))
    return piece
