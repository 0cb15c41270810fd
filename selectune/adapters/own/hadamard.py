"""The Hadamard adapter: a factor and a shift for each output of self-attention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from selectune.adapters.injected import Injected, Wanted, put_children
from selectune.adapters.roles import of_kind, width
from selectune.errors import ConfigError

NAME = "hadamard"


class Hadamard(nn.Module):
    """w * h + b, w and b (d,): one layer's 2d scalars. w = 1 and b = 0 at the start, so the model is unchanged.

    >>> adapter, h = Hadamard(4), torch.randn(2, 4)
    >>> torch.equal(adapter(h), h), sum(p.numel() for p in adapter.parameters())
    (True, 8)
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

    def forward(self, h: Tensor) -> Tensor:  # (..., d) -> (..., d)
        return (self.weight * h + self.bias).to(h.dtype)


def put_on(wanted: Wanted) -> Injected:
    """Puts one on the output of every self-attention. Raises ConfigError if the role map names none."""
    names = [role.name for role in of_kind(wanted.found, "attention_output") if not role.cross]
    if not names:
        name = type(wanted.model).__name__
        raise ConfigError(f"The role map of {name} names no place for hadamard adapters: it needs attention_output.")
    layers = {name: wanted.model.get_submodule(name) for name in names}
    children = {name: (Hadamard(width(layer)), cast(Tensor, layer.weight)) for name, layer in layers.items()}
    hook = lambda path, module, child: [module.register_forward_hook(_scaled)]  # noqa: E731
    return Injected(wanted.model, put_children(wanted.model, NAME, children, hook))


def _scaled(module: Any, args: Any, output: Tensor) -> Tensor:
    del args
    return module.hadamard(output)
