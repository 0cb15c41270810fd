"""Odd modules, third part: what models do to their own weights and modules; and the rows of `zoo_uses`."""

# ruff: noqa: E501 - a row a line

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from zoo_kit import SETTINGS, Call, impossible, raised, refused, score
from zoo_layers import Words, floats, ids, row
from zoo_uses import (
    Backdoor,
    Casts,
    Closure,
    Custom,
    Detached,
    Ends,
    Gated,
    Hyper,
    Lists,
    Low,
    Mapped,
    Picks,
    Scalars,
    Scripted,
    ScriptedPart,
    Structured,
    Sums,
    TiedWords,
    Twice,
    TwoDoors,
    by_encode,
    forward_and_hand,
    head_by_hand,
    of_answer,
    with_named_penalty,
    with_penalty,
)  # fmt: skip


class Dropped(nn.Module):
    """The weight-dropped LSTM: a weight taken out of the layer's parameters and put back, computed, at each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 4)
        self.raw = nn.Parameter(self.rnn.weight_hh_l0.detach().clone())
        del self.rnn._parameters["weight_hh_l0"]

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.weight_hh_l0 = F.dropout(self.raw, 0.3)
        self.rnn._flat_weights = [getattr(self.rnn, name) for name in self.rnn._flat_weights_names]
        return self.rnn(x)[0]


class Pair(nn.Module):
    """An encoder, and outside of it a decoder that uses the encoder's table: only the encoder is attached."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.dec.weight = self.enc.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dec(self.enc(tokens).tanh())


class Clamped(nn.Module):
    """Writes its own parameter in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.temperature = nn.Linear(6, 6), nn.Parameter(torch.tensor(5.0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.temperature.clamp_(0, 4)
        return self.lin(x) * self.temperature


class Renormed(nn.Module):
    """Rows of a matrix normalised in forward by a computed weight; the module's class has a property of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(6, 6))

    @property
    def weight(self) -> Tensor:
        return self.raw / self.raw.norm(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.normalize(self.raw, dim=0).sum(0)


class Halves(nn.Module):
    """One fused matrix, split and used in parts, as q, k and v are; a part is turned, one is expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.token = nn.Parameter(torch.randn(18, 6)), nn.Parameter(torch.randn(1, 1, 6))
        self.turned = nn.Parameter(torch.randn(6, 6).t())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = (F.linear(x, part) for part in self.qkv.chunk(3))
        return F.scaled_dot_product_attention(q, k, v) @ self.turned


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def symmetric() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return model


class Out(nn.Module):
    """out= and in-place arithmetic with a weight on the right."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.gain = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.0
        h *= self.gain
        h += self.lin.bias
        h.addmm_(x, self.lin.weight)
        h[:, :3] = x[:, 3:] * self.gain[:3]
        return h


class Hooked(nn.Module):
    """A forward hook that adds a use of a weight, a pre-hook that changes the input."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.gain = nn.Linear(6, 6), nn.Parameter(torch.randn(6))
        self.lin.register_forward_hook(lambda module, args, out: out * out.detach().mean() + module.weight.sum(1))
        self.lin.register_forward_pre_hook(lambda module, args: (args[0] * module.bias,))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.gain


class Recursive(nn.Module):
    """Calls itself on what it gives, as deep-equilibrium models do."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        h = self.lin(x).tanh()
        return self(h, depth - 1) if depth else h


def contrastive(model: nn.Module, batch: Any, run: Call) -> Tensor:
    """Two forwards in one loss."""
    one, two = run(model, *batch), run(model, batch[0].flip(0))
    return score(one) + (one * two).mean()


def regularised(model: nn.Module, batch: Any, run: Call) -> Tensor:
    """A gradient penalty: the gradient by the input is part of the loss."""
    x = batch[0]
    y = run(model, x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return score(y) + slope.square().mean()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))


WRITTEN = dict.fromkeys(SETTINGS, refused("outside the support"))

OWN_VECTOR = dict.fromkeys(SETTINGS, refused("own vector"))  # said by Tuner.check
TWICE = dict.fromkeys(SETTINGS, raised("differentiate twice"))

ROWS = [
    row("tied head", lambda: TiedWords(False, None), ids(3, 5)),
    row("tied head with padding", lambda: TiedWords(False, 0), ids(3, 5)),
    row("table used as a function too", lambda: TiedWords(True, None), ids(3, 5)),
    row("table with padding used as a function too", lambda: TiedWords(True, 0), ids(3, 5)),
    row("0-d parameters", Scalars, floats(4, 6)),
    row("used twice", Twice, floats(4, 6)),
    row("used with and without gradient", Detached, floats(4, 6)),
    row("closure, checkpointed", lambda: Closure(False), floats(4, 6)),
    row("closure, checkpointed reentrant", lambda: Closure(True), floats(4, 6)),
    row("checkpointed block ends in a norm", lambda: Ends(False, lambda: nn.LayerNorm(6)), floats(4, 6)),
    row("checkpointed block ends in a norm, reentrant", lambda: Ends(True, lambda: nn.LayerNorm(6)), floats(4, 6)),
    row("checkpointed block ends in gelu", lambda: Ends(False, nn.GELU), floats(4, 6)),
    row("checkpointed block ends in silu", lambda: Ends(False, nn.SiLU), floats(4, 6)),
    row("checkpointed block ends in a product", lambda: Ends(False, Gated), floats(4, 6)),
    row("functional_call with computed weights", lambda: Hyper(False), floats(4, 6)),
    row("reparametrized inside forward", lambda: Hyper(True), floats(4, 6)),
    row("autograd function given a weight", Custom, floats(4, 6)),
    row("scripted function given a weight", Scripted, floats(4, 6), expects={"nonreentrant": impossible("TorchScript")}),
    row("scripted submodule", ScriptedPart, floats(4, 6), expects=dict.fromkeys(SETTINGS, refused("scripted"))),
    row("einsum and baddbmm", Sums, floats(4, 6)),
    row("read through _parameters", lambda: Backdoor("_parameters"), floats(4, 6)),
    row("read through parameters()", lambda: Backdoor("parameters()"), floats(4, 6), expects=OWN_VECTOR),
    row("read through get_parameter", lambda: Backdoor("get_parameter"), floats(4, 6)),
    row("reference kept since __init__", lambda: Backdoor("kept"), floats(4, 6)),
    row("encode beside forward", TwoDoors, floats(4, 6), loss=by_encode),
    row("head applied by hand in the loss", TwoDoors, floats(4, 6), loss=head_by_hand),
    row("forward, and layers by hand in the loss", TwoDoors, floats(4, 6), loss=forward_and_hand),
    row("penalty over parameters() in the loss", TwoDoors, floats(4, 6), loss=with_penalty, expects={s: e for s, e in OWN_VECTOR.items() if s != "bf16"}),
    row("penalty on two weights in the loss", TwoDoors, floats(4, 6), loss=with_named_penalty),
    row("weight.float()", lambda: Casts("float"), floats(4, 6), tie=1e-5),
    row("weight.type(torch.float32)", lambda: Casts("type"), floats(4, 6), tie=1e-5),
    row("weight.type_as and to", lambda: Casts("type_as"), floats(4, 6), tie=1e-5),
    row("vmap", lambda: Mapped("vmap"), floats(4, 6)),
    row("vmap of a layer", lambda: Mapped("vmap of a layer"), floats(4, 6)),
    row("vmap over a weight", lambda: Mapped("vmap over weights"), floats(4, 6)),
    row("torch.func.grad inside forward", lambda: Mapped("grad"), floats(4, 6), expects={"nonreentrant": impossible("saved tensor hooks")}),
    row("gradient by the input inside forward", lambda: Mapped("create_graph"), floats(4, 6), expects=TWICE | {"reentrant": impossible("does not require grad")}),
    row("gradient penalty in the loss", mlp, floats(4, 6), loss=regularised, expects=TWICE | {"reentrant": impossible("incompatible with .grad()")}),
    row("indexed parameter", Picks, ids(3, 5)),
    row("ParameterList and ParameterDict", Lists, floats(4, 6)),
    row("LoRA by hand", lambda: Low(False), floats(4, 6)),
    row("LoRA by hand, merged", lambda: Low(True), floats(4, 6)),
    row("returns a dict", lambda: Structured("dict"), floats(4, 6), expects={"reentrant": impossible("does not require grad")}),
    row("returns a dataclass", lambda: Structured("dataclass"), floats(4, 6), loss=of_answer, expects={"reentrant": impossible("does not require grad")}),
    row("returns a tuple", lambda: Structured("tuple"), floats(4, 6), expects={"reentrant": impossible("not that of the plain run")}),
    row("weight-dropped lstm", Dropped, floats(3, 2, 6)),
    row("tied to a module outside the attached part", Pair, ids(3, 5), part="enc"),
    row("writes its own parameter", Clamped, floats(4, 6), expects=WRITTEN),
    row("weight is a property", Renormed, floats(4, 6)),
    row("fused matrix in parts", Halves, floats(2, 4, 6)),
    row("own parametrization", symmetric, floats(4, 6)),
    row("in-place arithmetic with weights", Out, floats(4, 6)),
    row("user's forward hooks", Hooked, floats(4, 6)),
    row("calls itself", Recursive, floats(4, 6)),
    row("two forwards in one loss", mlp, floats(4, 6), loss=contrastive),
    row("words", lambda: Words(nn.Embedding(12, 8)), ids(3, 5)),
]  # fmt: skip
