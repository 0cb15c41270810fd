"""Odd modules, second half: weights used in other ways than by a layer's own forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo_kit import Call, score


class TiedWords(nn.Module):
    """Table and head are one matrix; the head may read it as a function, padding row included."""

    def __init__(self, by_hand: bool, padding: int | None) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(12, 8, padding_idx=padding), nn.Linear(8, 8)
        self.by_hand = by_hand
        if not by_hand:
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.mix(self.table(tokens)).tanh()
        return F.linear(h, self.table.weight) if self.by_hand else self.head(h)


class Scalars(nn.Module):
    """0-d parameters, alone and in products."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(0.1))
        self.lin = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.scale + self.shift**2


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.raw = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(self.lin(x).tanh())
        return (h @ self.raw).tanh() @ self.raw.t() + self.raw.diagonal() + self.lin.weight.sum(0)


class Detached(nn.Module):
    """A use with a gradient and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.gain = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.lin.weight.detach()) * self.gain.detach()
        with torch.no_grad():
            mean = self.lin(x).mean() + self.gain.data.sum()
        return self.lin(h) * self.gain + mean


class Closure(nn.Module):
    """A checkpointed function that reads a raw parameter of its surroundings."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.f, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.gamma, self.reentrant = nn.Parameter(torch.full((6,), 0.1)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(checkpoint(lambda y: y + self.gamma * self.f(y), h, use_reentrant=self.reentrant))


class Ends(nn.Module):
    """Checkpointed blocks, each with a plain layer behind it: what that layer saves is made within the block."""

    def __init__(self, reentrant: bool, last: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), last()) for _ in range(2))
        self.between = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block, layer in zip(self.blocks, self.between, strict=True):
            h = layer(checkpoint(block, h, use_reentrant=self.reentrant))
        return h


class Gated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * x


class Hyper(nn.Module):
    """functional_call inside forward, with weights computed from others."""

    def __init__(self, strings: bool) -> None:
        super().__init__()
        self.net, self.gain = (
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)),
            nn.Parameter(torch.tensor(1.5)),
        )
        self.strings = strings

    def forward(self, x: Tensor) -> Tensor:
        if self.strings:
            from torch.nn.utils.stateless import _reparametrize_module

            with _reparametrize_module(self.net, {"0.weight": self.net[0].weight * self.gain}):
                return self.net(x)
        made = {name: p * self.gain for name, p in self.net.named_parameters()}
        return torch.func.functional_call(self.net, made, (x,))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight**3

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return dy * weight**3, (dy * x * 3 * weight**2).sum(0)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.cube = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(self.lin(x), self.cube)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x + bias)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias_gelu = torch.jit.script(bias_gelu)
        self.lin, self.bias = nn.Linear(6, 6, bias=False), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias_gelu(self.lin(x), self.bias)


class ScriptedPart(nn.Module):
    """A submodule that is a script: its forward is not Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh())), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.mix = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bi,eij->ebj", x, self.experts)
        h = torch.baddbmm(self.mix[:, None, :], x.expand(3, -1, -1), self.experts) + h
        return torch.einsum("ebj,ej->bj", h, self.mix)


class Backdoor(nn.Module):
    """Reads its weights where no attribute of a module is asked."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.lin, self.gain, self.way = nn.Linear(6, 6), nn.Parameter(torch.randn(6)), way
        self.kept = [self.gain, self.lin.weight]

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "_parameters":
            return F.linear(x, self.lin._parameters["weight"]) * self._parameters["gain"] + self.lin(x)
        if self.way == "parameters()":
            kept = self.state_dict(keep_vars=True)
            return self.lin(x) * sum(p.sum() for p in self.lin.parameters()) * kept["gain"] + kept["lin.bias"]
        if self.way == "get_parameter":
            return F.linear(x, self.get_parameter("lin.weight")) * dict(self.named_parameters())["gain"]
        return F.linear(x, self.kept[1]) * self.kept[0] + self.lin(x)


class TwoDoors(nn.Module):
    """encode beside forward; a head for the loss to use."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.gain = nn.Linear(6, 6), nn.Linear(6, 3), nn.Parameter(torch.randn(6))

    def encode(self, x: Tensor) -> Tensor:
        return self.body(x).tanh() * self.gain

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))


def by_encode(model: Any, batch: Any, run: Call) -> Tensor:
    return score(run(model.encode, *batch))


def head_by_hand(model: Any, batch: Any, run: Call) -> Tensor:
    return score(F.linear(run(model.encode, *batch), model.head.weight, model.head.bias))


def forward_and_hand(model: Any, batch: Any, run: Call) -> Tensor:
    return score((run(model, *batch), model.head(model.encode(*batch))))


def with_penalty(model: Any, batch: Any, run: Call) -> Tensor:
    return score(run(model, *batch)) + 0.1 * sum(p.square().sum() for p in model.parameters())


def with_named_penalty(model: Any, batch: Any, run: Call) -> Tensor:
    return score(run(model, *batch)) + 0.1 * model.body.weight.square().sum() + 0.1 * model.gain.abs().sum()


class Casts(nn.Module):
    """Weights cast in forward, as routers and norms of half-precision models are."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.lin, self.gain, self.way = nn.Linear(6, 6), nn.Parameter(torch.randn(6)), way

    def forward(self, x: Tensor) -> Tensor:
        w, gain = self.lin.weight, self.gain
        if self.way == "float":
            w, gain = w.float(), gain.float()
        elif self.way == "type":
            w, gain = w.type(torch.float32), gain.type(torch.FloatTensor)
        elif self.way == "type_as":
            w, gain = w.type_as(torch.zeros(1)), gain.to(torch.float32)
        else:
            self.lin.float()
            return (self.lin(x.float()) * gain).to(x.dtype)
        return (F.linear(x.float(), w) * gain).to(x.dtype)


class Mapped(nn.Module):
    """torch.func inside forward: vmap over the batch; grad of an energy."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.lin, self.raw, self.way = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6)), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "vmap":
            return torch.func.vmap(lambda row: torch.tanh(self.raw @ row) + self.lin.bias)(self.lin(x))
        if self.way == "vmap of a layer":
            return torch.func.vmap(self.lin)(x) @ self.raw
        if self.way == "vmap over weights":
            return torch.func.vmap(lambda w: x @ w)(self.raw).mT + self.lin(x)
        if self.way == "create_graph":
            h = self.lin(x).tanh()
            return torch.autograd.grad(h.square().sum(), x, create_graph=True)[0] @ self.raw
        return torch.func.grad(lambda y: (y @ self.raw).tanh().sum())(self.lin(x))


class Picks(nn.Module):
    """A parameter by index, slice, mask, gather, view and assignment of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.pos = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(1, 9, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table[tokens] + self.pos[:, : tokens.shape[1]]
        h = h + self.table.index_select(0, tokens[0])[None] + self.table[self.table[:, 0] > 0].sum(0)
        row = torch.zeros_like(h[0]).index_copy(0, torch.tensor([0]), self.pos[0, :1])
        return h + row + self.table.view(3, 4, 4).unbind(0)[1].mean(0)


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.many = nn.ParameterList([nn.Parameter(torch.randn(6, 6)) for _ in range(3)])
        self.named = nn.ParameterDict({"gain": nn.Parameter(torch.randn(6)), "shift": nn.Parameter(torch.randn(6))})

    def forward(self, x: Tensor) -> Tensor:
        for matrix in self.many:
            x = (x @ matrix).tanh()
        return x * self.named["gain"] + self.named["shift"]


class Low(nn.Module):
    """LoRA by hand: the base frozen, B and A trained; B may be merged into the weight in forward."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.base, self.merged = nn.Linear(6, 6), merged
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(6, 2))
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.b @ self.a, self.base.bias)
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    more: dict[str, Tensor]


class Structured(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(6, 6), nn.Linear(6, 3), kind

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).tanh()
        y = self.b(h)
        if self.kind == "dict":
            return {"logits": y, "all": [h, {"again": y * 2}], "none": None}
        return Answer(y, (h,), {"double": y * 2}) if self.kind == "dataclass" else (y, (h, None), 3)


def of_answer(model: nn.Module, batch: Any, run: Call) -> Tensor:
    answer = run(model, *batch)
    return score((answer.logits, answer.hidden, answer.more))
