"""Odd modules, fourth part: what a model may ask of its weights, and the ways around a module's forward."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo_kit import SETTINGS, Call, impossible, raised, refused, score
from zoo_layers import floats, ids, row


class Base(nn.Module):
    """A linear layer and a gain, for those below."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.gain = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        return self.lin(x).tanh() * self.gain


class GivenToCheckpoint(Base):
    """Weights as arguments of a checkpointed function."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        weights = self.lin.weight, self.gain
        return checkpoint(lambda x, w, g: F.linear(x, w).tanh() * g, x, *weights, use_reentrant=self.reentrant)


class Target(Base):
    """A target network, frozen, that forward moves towards the trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for own, other in zip(self.target.parameters(), self.lin.parameters(), strict=True):
                own.mul_(0.9).add_(other, alpha=0.1)
        return super().forward(x) * self.target(x)


class Threads(Base):
    """The work is done in another thread."""

    def forward(self, x: Tensor) -> Tensor:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(super().forward, x).result()


class Direct(Base):
    """Layers whose forward is called without their hooks."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lin.forward(x) * self.gain + F.linear(x, *self.lin.parameters())


class Identity(Base):
    """Looks its weights up by identity and by hash."""

    def __init__(self) -> None:
        super().__init__()
        self.number = {id(p): n for n, p in enumerate(self.parameters())}

    def forward(self, x: Tensor) -> Tensor:
        found = {p: n for n, p in enumerate(self.parameters())}
        named = {n for n, p in self.named_parameters() if p is self.gain or p is self.lin.weight}
        return super().forward(x) * (1.0 + found[self.gain] + self.number.get(id(self.gain), 7)) * len(named)


class Types(Base):
    """Asks what its weights are."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        if isinstance(self.gain, nn.Parameter) and isinstance(self.lin.weight, nn.Parameter):
            h = h * self.gain
        return h * 2.0 if isinstance(self.lin.bias, torch.Tensor) else h


class AsksForGradient(Base):
    """Uses a weight if it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x) if self.lin.weight.requires_grad else x
        return h * self.gain if self.gain.requires_grad and self.gain.is_leaf else h


class Numbers(Base):
    """Reads weights as numbers, which sends no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        largest = float(self.gain.max()) + self.gain.detach().numpy().sum() + self.gain[0].item()
        if self.gain.abs().max() > 0 and torch.equal(self.gain, self.gain) and f"{self.gain}":
            largest = largest + sum(self.lin.bias.tolist())
        return super().forward(x) * largest


class NumbersWide(Numbers):
    """The same without numpy, which knows no bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return Base.forward(self, x) * (float(self.gain.max()) + self.gain[0].item() + len(self.gain))


class Copies(Base):
    """Copies, casts and turns of weights before they are used."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.lin.weight.clone().contiguous().to(x.dtype).to(x.device)
        h = x @ w.t().T.mT + self.lin.bias.view(1, -1).expand(x.shape[0], -1)
        return h * self.gain.reshape(2, 3).flatten() + self.gain.type_as(x).cpu().unsqueeze(0).squeeze()


class Lumps(Base):
    """Weights in lists: cat, stack, foreach, one vector of all."""

    def forward(self, x: Tensor) -> Tensor:
        h = x @ torch.cat([self.lin.weight, self.gain[None]]).sum(0) + torch.stack([self.gain, self.lin.bias]).sum()
        norms = torch._foreach_norm([self.gain, self.lin.weight])
        return h * torch.stack(list(norms)).sum() + nn.utils.parameters_to_vector([self.gain, self.lin.bias]).mean()


class Aten(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.ops.aten.addmm.default(self.lin.bias, x, torch.ops.aten.t.default(self.lin.weight))
        return torch.ops.aten.mul.Tensor(h, self.gain)


class Library(Base):
    """An operator of torch.library, with a formula of its own for the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.lin(x), self.gain)


@torch.library.custom_op("selectune_zoo::scaled", mutates_args=())
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight.square()


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return dy * weight.square(), (dy * x * 2 * weight).sum(0)


scaled.register_autograd(_backward, setup_context=_keep)


class Ensemble(nn.Module):
    """Weights of several modules stacked, one vmapped call of them all."""

    def __init__(self) -> None:
        super().__init__()
        self.many = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        stacked = {n: torch.stack([dict(m.named_parameters())[n] for m in self.many]) for n in ("weight", "bias")}
        one = self.many[0]
        return torch.func.vmap(lambda weights: torch.func.functional_call(one, weights, (x,)))(stacked)


class InnerLoop(Base):
    """First-order meta-learning: the gradient by a weight inside of forward."""

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.lin.weight).square().mean()
        (slope,) = torch.autograd.grad(inner, self.lin.weight)
        return F.linear(x, self.lin.weight - 0.1 * slope) * self.gain


class OwnParameter(nn.Parameter):
    """A parameter's class of a library's own."""


class OwnClass(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gain = OwnParameter(torch.randn(6))


class EvalLayer(nn.Module):
    """A layer in evaluation mode, where torch has a fast path if nothing in it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.eval()
        return self.layer(x.detach())


class TwoNames(nn.Module):
    """One layer under two names, a bias shared by two."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.two = nn.Linear(6, 6)
        self.three, self.four = nn.Linear(6, 6), nn.Linear(6, 6)
        self.four.bias = self.three.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.four(self.three(self.two(self.one(x).tanh())).tanh())


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2]), batch_first=True)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


class Adaptive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 8), nn.AdaptiveLogSoftmaxWithLoss(8, 12, [4, 8], div_value=2.0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).flatten(0, 1), tokens.flatten().flip(0)).loss


def traced() -> nn.Module:
    return nn.Sequential(torch.jit.trace(nn.Linear(6, 6), torch.zeros(2, 6)), nn.Linear(6, 3))


def compiled() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(6, 6), backend="eager"), nn.Linear(6, 3))


def backward_hooks() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))
    model[2].register_full_backward_pre_hook(lambda module, out: (out[0] * 2.0,))
    return model


def parameter_hook() -> nn.Module:
    model = Base().double()
    model.gain.register_hook(lambda gradient: gradient * torch.tensor([0, 1, 2, 3, 4, 5], dtype=gradient.dtype))
    return model


def direct_forward(model: nn.Module, batch: Any, run: Call) -> Tensor:
    return score(run(model.forward, *batch))


def after_no_grad(model: nn.Module, batch: Any, run: Call) -> Tensor:
    """A pass without gradients before, one in inference mode, one without gradients behind."""
    with torch.no_grad():
        before = score(model(*batch))
    with torch.inference_mode():
        model(batch[0].detach().clone())
    loss = score(run(model, *batch)) * before
    with torch.no_grad():
        model(*batch)
    return loss


# the tuner's vector is the last parameter of the last layer, so a layer's own parameters() are one more
MOVED = dict.fromkeys(SETTINGS, raised("zip() argument"))
MOVED |= dict.fromkeys(("reentrant", "nonreentrant"), impossible("the gradient is not that of the plain run"))
NESTED = raised("different number of tensors was saved")  # one checkpoint detaches what the other keeps
MORE = dict.fromkeys(SETTINGS, raised("argument"))
INNER = dict.fromkeys(SETTINGS, refused("torch.autograd.grad"))
INNER["reentrant"] = impossible("does not require grad")  # the first pass runs without gradients
NORMED = {s: refused("max_norm") for s in SETTINGS if s != "reentrant"}  # it rewrites rows that are not selected

ROWS = [
    row(
        "weights given to checkpoint", lambda: GivenToCheckpoint(False), floats(4, 6), expects={"nonreentrant": NESTED}
    ),
    row("weights given to checkpoint, reentrant", lambda: GivenToCheckpoint(True), floats(4, 6)),
    row("target network moved in forward", Target, floats(4, 6), expects=MOVED),
    row("forward in another thread", Threads, floats(4, 6)),
    row("layers' forward called directly", Direct, floats(4, 6), expects=MORE),
    row("the model's forward called directly", Base, floats(4, 6), loss=direct_forward),
    row("weights by identity", Identity, floats(4, 6)),
    row("weights' types", Types, floats(4, 6)),
    row("asks whether a weight is trained", AsksForGradient, floats(4, 6)),
    row("weights as numbers", Numbers, floats(4, 6), expects={"bf16": impossible("BFloat16")}),
    row("weights as numbers, without numpy", NumbersWide, floats(4, 6)),
    row("copies and casts", Copies, floats(4, 6)),
    row("weights in lists", Lumps, floats(4, 6)),
    row("aten operators", Aten, floats(4, 6)),
    row("torch.library operator", Library, floats(4, 6)),
    row("ensemble by vmap", Ensemble, floats(4, 6)),
    row("gradient by a weight inside forward", InnerLoop, floats(4, 6), expects=INNER),
    row("parameter of a class of its own", OwnClass, floats(4, 6)),
    row("encoder layer in evaluation mode", EvalLayer, floats(2, 5, 8)),
    row("one layer under two names", TwoNames, floats(4, 6)),
    row("packed sequences", Packed, floats(2, 4, 6)),
    row("adaptive softmax", Adaptive, ids(3, 5)),
    row("traced submodule", traced, floats(4, 6), expects=dict.fromkeys(SETTINGS, refused("traced"))),
    row("compiled submodule", compiled, floats(4, 6), short=False),
    row("backward hooks on modules", backward_hooks, floats(4, 6)),
    row("hook on a parameter", parameter_hook, floats(4, 6), expects=dict.fromkeys(SETTINGS, refused("a hook"))),
    row("passes without gradients between", Base, floats(4, 6), loss=after_no_grad),
    row("embedding with max_norm", lambda: nn.Embedding(12, 8, max_norm=1.0), ids(3, 5), expects=NORMED),
]
