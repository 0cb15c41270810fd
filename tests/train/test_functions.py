"""Weights given to an autograd function of somebody else's get their gradient, as under a dense optimizer."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from loop_kit import X, assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint

import selectune as st


class Product(torch.autograd.Function):
    """A function like a fused kernel's: x W^T with a backward of its own."""

    @staticmethod
    def forward(ctx, x, weight, scale=1.0):
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return scale * (x @ weight.T)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return ctx.scale * dy @ weight, ctx.scale * dy.T @ x, None


class Fused(nn.Module):
    """The first and the last layer share a weight; the last one uses it inside a function."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.inner, self.head, self.checkpointed = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), checkpointed
        self.head.weight = self.inner.weight
        self.own = nn.Parameter(torch.randn(8, 8))
        self.double()

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        if self.checkpointed:
            h = checkpoint(lambda h: Product.apply(h, self.own), h, use_reentrant=False)
        else:
            h = Product.apply(h, self.own)
        return Product.apply(torch.tanh(h), self.head.weight, 0.5)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_support_and_weights_are_the_dense_oracles(checkpointed, accumulation):
    def loop(trainer, step):
        for i in range(accumulation):
            trainer.model(X[accumulation * step + i]).square().mean().backward()

    assert_same(Fused(checkpointed), loop, accumulation=accumulation)


def test_torchs_own_calls_are_back_after_detach():
    """In a process of its own: tuners of other tests may still be on in this one."""
    code = """
        import torch, selectune as st
        kinds = torch.autograd.Function, torch._C.ScriptFunction, torch._C.ScriptMethod
        now = lambda: [kind.__dict__["apply" if kind is kinds[0] else "__call__"] for kind in kinds]
        own = now()
        tuners = [st.attach(torch.nn.Linear(4, 4), st.random(budget=3)) for _ in range(2)]
        assert all(a is not b for a, b in zip(now(), own, strict=True))
        tuners[0].detach()
        assert all(a is not b for a, b in zip(now(), own, strict=True))
        tuners[1].detach()
        assert all(a is b for a, b in zip(now(), own, strict=True))
        tuner = st.attach(torch.nn.Linear(4, 4), st.random(budget=3))
        del tuner
        import gc; gc.collect()
        assert all(a is b for a, b in zip(now(), own, strict=True)), "forgotten without detach"
        assert torch.jit.script(torch.nn.Linear(2, 2))(torch.ones(1, 2)).shape == (1, 2)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_two_models_at_once():
    inner, outer = Fused(), Fused()
    tuners = [st.attach(m, st.random(budget=9), seed=7) for m in (inner, outer)]
    outer.inner.register_forward_hook(lambda module, args, y: y + inner(y))
    outer(X[0]).square().sum().backward()
    assert all(tuner.parameters()[0].grad.count_nonzero() > 5 for tuner in tuners)


class Inner(nn.Module):
    """A step of descent inside forward, by a transform of torch.func over the weight itself."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last, self.way = nn.Linear(8, 8), nn.Linear(8, 4, bias=False), way
        self.double()

    def forward(self, x):
        h, w = torch.tanh(self.first(x)), self.last.weight

        def energy(weight):
            return (h @ weight.T).square().mean()

        if self.way == "vmap":
            return torch.func.vmap(lambda row: h @ row)(w).T
        if self.way == "grad":
            step = torch.func.grad(energy)(w)
        elif self.way == "vjp":
            step = torch.func.vjp(energy, w)[1](torch.ones((), dtype=w.dtype))[0]
        elif self.way == "jacrev":
            step = torch.func.jacrev(energy)(w)
        else:
            step = torch.func.grad(lambda p: torch.func.functional_call(self.last, p, (h,)).square().mean())(
                dict(self.last.named_parameters())
            )["weight"]
        return h @ (w - 0.3 * step).T


@pytest.mark.parametrize("way", ["vmap", "grad", "vjp", "jacrev", "functional_call"])
def test_a_weight_given_to_a_transform(way):
    def loop(trainer, step):
        trainer.model(X[step]).square().mean().backward()

    assert_same(Inner(way), loop)


@pytest.mark.parametrize("part", ["encode", "forward"])
def test_a_reentrant_checkpoint_of_what_is_no_module_beside_uses_by_hand(part):
    def loop(trainer, step):
        model, x = trainer.model, X[step].clone().requires_grad_()
        function = (lambda x: torch.tanh(model.first(x))) if part == "encode" else model
        h = checkpoint(function, x, use_reentrant=True)
        by_hand = model.last(h) if part == "encode" else model.last(torch.tanh(model.first(x)))
        (h.square().mean() + by_hand.square().mean()).backward()

    assert_same(Inner("grad"), loop)


def test_a_penalty_that_counts_the_offsets_is_told_once(caplog):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)).double()
    tuner = st.attach(model, st.random(budget=9), seed=1)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for penalty in (0.0, 0.0, 0.1, 0.1):
        loss = model(X[0]).square().mean()
        if penalty:
            loss = loss + penalty * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        assert ("own vector" in caplog.text) == (penalty > 0)
        optimizer.step()
        optimizer.zero_grad()
    assert caplog.text.count("own vector") == 1


def test_a_forgotten_tuner_may_go_while_a_transform_runs():
    held = [nn.Linear(4, 4)]
    st.attach(held[0], st.random(budget=3))
    gone = weakref.ref(held[0])

    def drops(x):
        held.clear()
        gc.collect()
        return x * 2

    torch.func.vmap(drops)(torch.ones(2))  # what a finalizer raises, pytest tells
    assert gone() is None
