"""UniPELT: LoRA, a bottleneck and a prefix together, each behind a gate that reads its input."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from selectune.adapters.injected import Injected, Wanted, put_children
from selectune.adapters.own.bottleneck import Bottleneck
from selectune.adapters.own.low_rank import LowRank
from selectune.adapters.roles import input_width, of_kind, width
from selectune.errors import ConfigError

NAME = "unipelt"
CACHES = ("past_key_values", "cache")  # what transformers calls keys and values from outside; the latter since 5.24


class Gated(nn.Module):
    """sigmoid(w . x + b) f(x), a gate for each token: around LoRA on queries and values, and around the bottleneck."""

    def __init__(self, m: int, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.gate = inner, gate(m)

    def forward(self, x: Tensor) -> Tensor:  # (..., m) -> (..., n)
        return (torch.sigmoid(self.gate(x.to(self.gate.weight.dtype))) * self.inner(x)).to(x.dtype)


class GatedPrefix(nn.Module):
    """Keys and values of P virtual tokens, (P, d) each, times one gate a row: the mean of its tokens' gates."""

    def __init__(self, count: int, d: int) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(torch.empty(count, d)), nn.Parameter(torch.empty(count, d))
        self.gate = gate(d)
        for part in (self.keys, self.values):
            nn.init.normal_(part, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> Prefixed:
        """`x`: (rows, tokens, d), what goes into attention. `mask`: (rows, 1, queries, keys), as attention gets it."""
        gates = torch.sigmoid(self.gate(x.to(self.gate.weight.dtype)))  # (rows, tokens, 1)
        if mask is None:
            open_ = gates.mean(1, keepdim=True)
        else:
            last = mask[:, 0, -1, :, None]
            seen = (last if last.dtype == torch.bool else last >= 0).to(gates.dtype)
            open_ = (gates * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp_min(1.0)
        return Prefixed(open_ * self.keys, open_ * self.values)


class Prefixed:
    """In the place of a cache: puts keys and values of (rows, P, d) before those that attention has made."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *where: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """(rows, heads, tokens, width of a head) each -> the same with P tokens more."""
        del where, more
        return self._before(self.keys, keys), self._before(self.values, values)

    def _before(self, prefix: Tensor, own: Tensor) -> Tensor:
        rows, heads, _, size = own.shape
        split = prefix.to(own.dtype).expand(rows, -1, -1).view(rows, -1, heads, size).transpose(1, 2)
        return torch.cat((split, own), dim=2)


def gate(m: int) -> nn.Linear:
    """A gate's linear map from m to 1, so small that gates begin near 1/2."""
    made = nn.Linear(m, 1)
    nn.init.normal_(made.weight, std=0.02)
    nn.init.zeros_(made.bias)
    return made


def put_on(wanted: Wanted) -> Injected:
    """Puts all three on an encoder: the prefix in self-attention, LoRA on queries and values, a bottleneck after FFNs.

    The prefix is trained directly, without the network that makes it in the paper. Raises ConfigError for a model whose
    attention is causal or takes no keys and values from outside, and for one without a norm behind the FFN.
    """
    model, o, children = wanted.model, wanted.options, dict[str, tuple[nn.Module, Tensor]]()
    layers = [(role, model.get_submodule(role.name)) for role in of_kind(wanted.found, "query", "value", "ffn2")]
    ends = {role.place: role.name for role in of_kind(wanted.found, "ffn_norm")}
    for role, layer in layers:
        weight, d = cast(Tensor, layer.weight), width(layer)
        if role.kind == "ffn2":
            inner = Bottleneck(d, max(1, d // o["reduction"]), "relu", "normal")
            children[ends.get(role.place, "")] = Gated(d, inner), weight
            continue
        m = input_width(layer)
        children[role.name] = Gated(m, LowRank(m, d, o["r"], o["alpha"] / o["r"])), weight
        if role.kind == "query":
            children[role.name.rpartition(".")[0]] = GatedPrefix(o["prefix"], d), weight
    attentions = [model.get_submodule(name) for name, (child, _) in children.items() if isinstance(child, GatedPrefix)]
    if "" in children or not attentions or not all(_takes(module) for module in attentions):
        raise ConfigError(
            f"unipelt gives attention keys and values from outside and sits behind a norm after the FFN, in encoders "
            f"such as BERT, RoBERTa and ELECTRA; {type(model).__name__} differs."
        )

    def hook(path: str, module: nn.Module, child: nn.Module) -> list[Any]:
        if isinstance(child, GatedPrefix):
            return [module.register_forward_pre_hook(_prefix, with_kwargs=True)]
        return [module.register_forward_hook(_around_norm if path in ends.values() else _added)]

    return Injected(model, put_children(model, NAME, children, hook))


def _takes(attention: nn.Module) -> bool:
    takes = inspect.signature(attention.forward).parameters
    return not getattr(attention, "is_causal", True) and any(name in takes for name in CACHES)


def _prefix(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    signature = inspect.signature(module.forward)
    given = dict(signature.bind(*args, **kwargs).arguments)
    more = given.pop("kwargs", {})
    mask = given.get("attention_mask")
    given[next(name for name in CACHES if name in signature.parameters)] = module.unipelt(given["hidden_states"], mask)
    if mask is not None:
        count = module.unipelt.keys.shape[0]
        given["attention_mask"] = torch.cat((torch.full_like(mask[..., :1], mask.dtype == torch.bool)
                                             .expand(*mask.shape[:-1], count), mask), dim=-1)  # fmt: skip
    return (), {**given, **more}


def _added(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + module.unipelt(args[0])


def _around_norm(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return module.forward(args[0] + module.unipelt(output))
