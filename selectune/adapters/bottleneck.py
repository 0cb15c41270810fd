"""Bottleneck adapters: small modules U f(D h + b1) + b2 inside a frozen transformer, put on by forward hooks.

With d the width of the model and r = d / reduction, a site holds 2dr + r + d scalars.

    houlsby   h <- h + U f(D h)            at the end of attention and of the FFN, before the residual is added
    pfeiffer  h <- h + U f(D LN(h + x))    at the end of the FFN; x is the residual, LN the layer's own norm
    parallel  h <- h + s U f(D x)          around the FFN; x is what goes into it

Where a model has no norm behind the FFN (pre-LN: LLaMA, GPT-2, T5), pfeiffer reads h + x itself, as AdapterHub does. A
site lies before the sub-layer's dropout, the papers put it behind: the same in evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from selectune.adapters.roles import Role, of_kind, width
from selectune.errors import ConfigError

NAME = "bottleneck"
"""Under this name an adapter is a child of the module whose output it changes."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "swish": F.silu, "tanh": torch.tanh
}  # fmt: skip
INITS = ("normal", "zero")


class Bottleneck(nn.Module):
    """s (U f(D h + b1) + b2), D (r, d), U (d, r): one site.

    `init`: "normal" draws both matrices from N(0, 0.02^2), so that scores of weights or gradients do not tie at 0;
    "zero" draws D as Kaiming and sets U to 0, so that the model is unchanged at the start. Biases are 0.

    >>> sum(p.numel() for p in Bottleneck(768, 48).parameters()) == 2 * 768 * 48 + 48 + 768
    True
    """

    def __init__(self, d: int, r: int, activation: str = "relu", init: str = "normal", scale: float = 1.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(d, r), nn.Linear(r, d)
        self.activation, self.scale = activation, scale
        self.held: Tensor | None = None  # the FFN's input, between the FFN's first layer and its last
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)
            nn.init.normal_(layer.weight, std=0.02)
        if init == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor) -> Tensor:  # (..., d) -> (..., d)
        hidden = ACTIVATIONS[self.activation](self.down(h.to(self.down.weight.dtype)))
        return (self.scale * self.up(hidden)).to(h.dtype)


def put_on(model: nn.Module, kind: str, options: Mapping[str, Any], found: Sequence[Role]) -> Callable[[], None]:
    """Puts adapters of a kind on a model and returns what takes them off again, without a trace.

    Raises ConfigError where the role map lacks the modules that the kind needs, or adapters are there already.
    """
    modules = dict(model.named_modules())
    sites = SITES[kind](found)
    if not sites:
        raise ConfigError(f"The role map of {type(model).__name__} names no place for {kind} adapters: {NEEDS[kind]}.")
    for site in sites:
        if hasattr(modules[site.where], NAME):
            raise ConfigError(f'"{site.where}" has an adapter already; take it off first.')
    handles: list[RemovableHandle] = []
    for site in sites:
        like = modules[site.width_of]
        d = width(like)
        made = Bottleneck(
            d, max(1, d // options["reduction"]), options["activation"], options["init"], options["scale"]
        )
        weight: Any = like.weight
        module = modules[site.where]
        dtype = torch.promote_types(weight.dtype, torch.float32)  # fp32 on a half model, as peft does
        module.add_module(NAME, made.to(weight.device, dtype).train(module.training))
        handles += site.hook(modules, made)

    def remove() -> None:
        for handle in handles:
            handle.remove()
        for site in sites:
            del modules[site.where]._modules[NAME]

    return remove


class Site:
    """One place: the module that carries the adapter, the module that tells its width, and the hooks."""

    def __init__(self, where: str, width_of: str, reads: str | None = None, norm: bool = False) -> None:
        self.where, self.width_of, self.reads, self.norm = where, width_of, reads, norm

    def hook(self, modules: Mapping[str, nn.Module], adapter: Bottleneck) -> list[RemovableHandle]:
        module = modules[self.where]
        if self.norm:
            return [module.register_forward_hook(_around_norm)]
        if self.reads is None:
            return [module.register_forward_hook(_series)]
        first = modules[self.reads]
        return [first.register_forward_pre_hook(_Hold(adapter)), module.register_forward_hook(_parallel)]


class _Hold:
    """Keeps what goes into the FFN until its last layer; an object, so that a copied model holds in its own adapter."""

    def __init__(self, adapter: Bottleneck) -> None:
        self.adapter = adapter

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        del module
        self.adapter.held = args[0]


def _series(module: Any, args: Any, output: Any) -> Any:
    del args
    h = output[0] if isinstance(output, tuple) else output
    changed = h + module.bottleneck(h)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _parallel(module: Any, args: Any, output: Tensor) -> Tensor:
    del args
    x, module.bottleneck.held = module.bottleneck.held, None
    return output + module.bottleneck(x)


def _around_norm(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return module.forward(args[0] + module.bottleneck(output))


def _houlsby(found: Sequence[Role]) -> list[Site]:
    return [Site(role.name, role.name) for role in of_kind(found, "attention_output", "ffn2")]


def _pfeiffer(found: Sequence[Role]) -> list[Site]:
    last = _by_layer(found, "ffn2")
    ends = of_kind(found, "ffn_norm", "ffn_end")
    return [Site(e.name, last[_layer(e)], norm=e.kind == "ffn_norm") for e in ends if _layer(e) in last]


def _parallel_sites(found: Sequence[Role]) -> list[Site]:
    first = _by_layer(found, "ffn1")
    return [Site(e.name, e.name, reads=first[_layer(e)]) for e in of_kind(found, "ffn2") if _layer(e) in first]


def _by_layer(found: Sequence[Role], kind: str) -> dict[tuple[str, int], str]:
    return {_layer(role): role.name for role in of_kind(found, kind)}


def _layer(role: Role) -> tuple[str, int]:
    return role.stack, role.layer


SITES: dict[str, Callable[[Sequence[Role]], list[Site]]] = {
    "houlsby": _houlsby, "pfeiffer": _pfeiffer, "parallel": _parallel_sites
}  # fmt: skip
NEEDS = {
    "houlsby": "it needs attention_output or ffn2",
    "pfeiffer": "it needs ffn2 and either ffn_norm or ffn_end",
    "parallel": "it needs ffn1 and ffn2",
}
