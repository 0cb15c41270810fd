"""A low-rank change of a linear layer, W + scale B A, as a module of our own: what SoRA, DyLoRA and IncreLoRA share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selectune.adapters.injected import Injected, Wanted, put_children
from selectune.adapters.roles import input_width, width

NAME = "low_rank"


class LowRank(nn.Module):
    """scale B A, A (r, m), B (n, r), for a layer from m to n.

    A is drawn as Kaiming. `init`: "zero" sets B to 0, so that the model is unchanged at the start; "normal" draws it
    from N(0, 0.02^2).

    >>> sum(p.numel() for p in LowRank(6, 4, 2).parameters())
    20
    """

    def __init__(self, m: int, n: int, r: int, scale: float = 1.0, init: str = "zero") -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(r, m)), nn.Parameter(torch.zeros(n, r))
        self.scale = scale
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        if init == "normal":
            nn.init.normal_(self.B, std=0.02)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(r, m) and (n, r): the change is the second times the first."""
        return self.A, self.scale * self.B

    def forward(self, x: Tensor) -> Tensor:  # (..., m) -> (..., n)
        right, left = self.factors()
        return F.linear(F.linear(x.to(right.dtype), right), left).to(x.dtype)


Site = TypeVar("Site", bound=LowRank)


def put_on(wanted: Wanted, make: Callable[[int, int, Mapping[str, Any]], Site]) -> tuple[Injected, list[Site]]:
    """Puts `make(m, n, options)` on every layer that `targets` selects; returns these modules too, in order."""
    layers = {name: wanted.model.get_submodule(name) for name in wanted.layers}
    weights = {name: cast(Tensor, layer.weight) for name, layer in layers.items()}
    children: dict[str, tuple[Site, Tensor]] = {}
    for name, layer in layers.items():
        children[name] = make(input_width(layer), width(layer), wanted.options), weights[name]
    hook = lambda path, module, child: [module.register_forward_hook(_added)]  # noqa: E731
    remove = put_children(wanted.model, NAME, children, hook)

    def merge() -> None:
        for name, (child, weight) in children.items():
            right, left = child.factors()
            change = left @ right
            weight.add_((change if isinstance(layers[name], nn.Linear) else change.T).to(weight.dtype))  # or Conv1D
        remove()

    return Injected(wanted.model, remove, merge), [child for child, _ in children.values()]


def _added(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + module.low_rank(args[0])
