"""Bottleneck adapters: small modules U f(D h + b1) + b2 inside a frozen transformer, put on by forward hooks.

With d the width of the model and r = d / reduction, a site holds 2dr + r + d scalars.

    houlsby   h <- h + U f(D h)            at the end of attention and of the FFN, before the residual is added
    pfeiffer  h <- h + U f(D LN(h + x))    at the end of the FFN; x is the residual, LN the layer's own norm
    parallel  h <- h + s U f(D x)          around the FFN; x is what goes into it
    series    h <- h + U f(D h)            at the end of the FFN, before the residual is added

In a model without a norm behind the FFN (pre-LN: LLaMA, GPT-2, T5), pfeiffer reads h + x itself, as AdapterHub does. An
adapter sits before the sub-layer's dropout; the papers put it behind, which is the same in evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from selectune.adapters.injected import Injected, Wanted, put_children
from selectune.adapters.roles import Role, of_kind, width
from selectune.errors import ConfigError

NAME = "bottleneck"
"""The adapter is a child of this name in the module whose output it changes."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "swish": F.silu, "tanh": torch.tanh
}  # fmt: skip
INITS = ("normal", "zero")
SitesOf = Callable[[Sequence[Role]], "list[Site]"]


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
        self.held: Tensor | None = None  # `parallel`: the FFN's input, from the FFN's first layer until its last
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)
            nn.init.normal_(layer.weight, std=0.02)
        if init == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor) -> Tensor:  # (..., d) -> (..., d)
        hidden = ACTIVATIONS[self.activation](self.down(h.to(self.down.weight.dtype)))
        return (self.scale * self.up(hidden)).to(h.dtype)


def put_on(sites_of: SitesOf, needs: str, wanted: Wanted) -> Injected:
    """Puts adapters on a model. Raises ConfigError if the role map lacks the modules that the kind needs."""
    modules, o = dict(wanted.model.named_modules()), wanted.options
    sites = {site.where: site for site in found_sites(sites_of, needs, wanted)}

    def made(like: nn.Module) -> tuple[nn.Module, Tensor]:
        d = width(like)
        site = Bottleneck(d, max(1, d // o["reduction"]), o["activation"], o["init"], o["scale"])
        return site, cast(Tensor, like.weight)

    children = {where: made(modules[site.width_of]) for where, site in sites.items()}
    hook = lambda where, module, child: sites[where].hook(modules, child)  # noqa: E731
    return Injected(wanted.model, put_children(wanted.model, NAME, children, hook))


def found_sites(sites_of: SitesOf, needs: str, wanted: Wanted) -> list[Site]:
    """The places of a kind's adapters; raises ConfigError where there are none."""
    sites = sites_of(wanted.found)
    if not sites:
        name = type(wanted.model).__name__
        raise ConfigError(f"The role map of {name} names no place for {wanted.kind} adapters: it needs {needs}.")
    return sites


@dataclass(frozen=True)
class Site:
    """The place of one adapter, by names of modules."""

    where: str  # the module that carries the adapter
    width_of: str  # a linear layer of the same width
    reads: str | None = None  # `parallel`: the FFN's first layer, whose input the adapter reads
    norm: bool = False  # whether `where` is the norm behind the FFN's residual

    def hook(self, modules: Mapping[str, nn.Module], adapter: Bottleneck) -> list[RemovableHandle]:
        """Register the hooks that run the adapter."""
        module = modules[self.where]
        if self.norm:
            return [module.register_forward_hook(_around_norm)]
        if self.reads is None:
            return [module.register_forward_hook(_series)]
        first = modules[self.reads]
        return [first.register_forward_pre_hook(_Hold(adapter)), module.register_forward_hook(_parallel)]


class _Hold:
    """Keeps the FFN's input for the adapter. As an object, it is copied with the model, together with its adapter."""

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
    last, ends = _by_layer(found, "ffn2"), of_kind(found, "ffn_norm", "ffn_end")
    return [Site(e.name, last[e.place], norm=e.kind == "ffn_norm") for e in ends if e.place in last]


def _parallel_sites(found: Sequence[Role]) -> list[Site]:
    first = _by_layer(found, "ffn1")
    return [Site(e.name, e.name, reads=first[e.place]) for e in of_kind(found, "ffn2") if e.place in first]


def _by_layer(found: Sequence[Role], kind: str) -> dict[tuple[str, int], str]:
    return {role.place: role.name for role in of_kind(found, kind)}


def _series_sites(found: Sequence[Role]) -> list[Site]:
    return [Site(role.name, role.name) for role in of_kind(found, "ffn2")]


houlsby = partial(put_on, _houlsby, "attention_output or ffn2")
pfeiffer = partial(put_on, _pfeiffer, "ffn2 and either ffn_norm or ffn_end")
parallel = partial(put_on, _parallel_sites, "ffn1 and ffn2")
series = partial(put_on, _series_sites, "ffn2")
