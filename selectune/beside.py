"""Values beside a quantised weight: a sparse part that is added to what its linear layers give.

    y = x dequantised(W)^T + b + x S^T        S (o, i) sparse

The values live on the modules that hold the weight, and a forward hook adds their product while there are any. A copy
of the model has a copy of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from selectune import ops
from selectune.bits import int_view
from selectune.internals import never_compiled
from selectune.quantised import BESIDE, Quantised

Node = Callable[[Tensor, Tensor, nn.Module], Tensor]
"""(input, output of the layer as it is, layer) -> output with the values, as an attached tuner computes it."""


class SideValues:
    """The values beside one weight (o, i): 0 but for some entries, which are replaced and never changed in place."""

    def __init__(self, weight: Quantised) -> None:
        self.shape, self.dtype, self._owners = weight.shape, weight.dtype, list(weight.owners)
        none = torch.empty(0, dtype=torch.int64, device=weight.device)
        self.held = (none, none.to(self.dtype))  # flat (n,) ascending, values (n,)
        self._hooked = False
        self.node: Node | None = None
        self._coordinates: tuple[Tensor, Tensor, Tensor] | None = None  # the flat indices that they are of, first

    # -- as a tensor of zeros with these values: what writes of deltas ask for

    def numel(self) -> int:
        return self.shape.numel()

    def stride(self) -> tuple[int, int]:
        return (self.shape[1], 1)

    def is_contiguous(self) -> bool:
        return False  # it has no memory to view

    @property
    def nbytes(self) -> int:
        return self.numel() * self.dtype.itemsize

    def gather(self, flat: Tensor) -> Tensor:
        """The values (n,) at flat indices (n,), on their device; 0 where there is none."""
        mine, values = self._on(flat.device)
        if not mine.numel():
            return values.new_zeros(flat.shape)
        at = torch.searchsorted(mine, flat).clamp_(max=mine.numel() - 1)
        return torch.where(mine[at] == flat, values[at], values.new_zeros(()))

    @torch.no_grad()
    def scatter(self, flat: Tensor, values: Tensor) -> None:
        """Makes the values at unique flat indices (n,) these (n,); a value whose bits are 0 is none."""
        mine, olds = self._on(flat.device)
        kept, there = torch.isin(mine, flat, invert=True), int_view(values) != 0
        merged, order = torch.sort(torch.cat((mine[kept], flat[there])))
        self.hold(merged, torch.cat((olds[kept], values[there].to(olds)))[order])

    # -- on the modules

    def hold(self, flat: Tensor, values: Tensor) -> None:
        """Makes these the values: flat (n,) ascending, values (n,), taken and not copied."""
        self.held = (flat, values)
        self._put()

    def follow(self, node: Node | None) -> None:
        """Lets a tuner compute the sum; None ends that."""
        self.node = node
        self._put()

    def _put(self) -> None:
        """On the modules, if there is anything to add."""
        needed = self.node is not None or self.held[0].numel() > 0
        if needed == self._hooked:
            return
        self._hooked = needed
        for owner in self._owners:
            if needed:
                owner.register_forward_hook(self, prepend=True, with_kwargs=True)
            for key in [key for key, hook in owner._forward_hooks.items() if hook is self and not needed]:
                del owner._forward_hooks[key]
                owner._forward_hooks_with_kwargs.pop(key, None)

    @never_compiled
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        x = args[0] if args else kwargs["input"]
        if self.node is not None:
            return self.node(x, output, module)
        return self.added(x, output) if self.held[0].numel() else None

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        """The output with the values' product, differentiable in both."""
        return Added.apply(output, x.to(output.dtype), *self.coordinates(x.device))

    def coordinates(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and values (n,) on a device."""
        flat, values = self._on(device)
        if self._coordinates is None or self._coordinates[0] is not flat:
            self._coordinates = (flat, flat // self.shape[1], flat % self.shape[1])
        return *self._coordinates[1:], values

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.held[0].device != device:
            self.held = (self.held[0].to(device), self.held[1].to(device))
        return self.held

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"node": None, "_coordinates": None}  # a copy has no tuner


class Added(torch.autograd.Function):
    """y + x S^T, for S that needs no gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, rows: Tensor, cols: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(rows, cols, values)
        ctx.shape = x.shape
        return with_product(output, x, rows, cols, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = product(dy, *_turned(ctx.saved_tensors), ctx.shape[-1]).to(dy.dtype) if ctx.needs_input_grad[1] else None
        return dy, dx, None, None, None


def with_product(output: Tensor, x: Tensor, rows: Tensor, cols: Tensor, values: Tensor) -> Tensor:
    """output + x S^T, in the output's dtype: the sum is rounded once."""
    return (output + product(x, rows, cols, values, output.shape[-1])).to(output.dtype)


def product(x: Tensor, rows: Tensor, cols: Tensor, values: Tensor, width: int) -> Tensor:
    """x S^T (..., width) in float32 or float64 for x (..., i)."""
    flat = x.reshape(-1, x.shape[-1])
    return ops.sparse_product(flat, rows, cols, values, width).view(*x.shape[:-1], width)


def _turned(entries: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols, values = entries
    return cols, rows, values


def side_of(weight: Quantised) -> SideValues:
    """The values beside a weight: one object for as long as its modules live."""
    found = weight.owners[0].__dict__.get(BESIDE)
    if found is None:
        found = SideValues(weight)
        weight.hold()
        for owner in weight.owners:
            owner.__dict__[BESIDE] = found
    return found
