"""Memory that calls use again, and work that layers share."""

from __future__ import annotations

import threading

import torch
from torch import nn

import selectune as st
from selectune import ops
from selectune.ops import cpu
from selectune.ops.scratch import release, scratch


def test_one_purpose_has_one_block_until_it_is_released():
    first = scratch("here", (4, 5), torch.float32)
    assert scratch("here", (2, 2), torch.float64).data_ptr() == first.data_ptr()
    assert scratch("there", (4, 5), torch.float32).data_ptr() != first.data_ptr()
    first.fill_(3)
    larger = scratch("here", (1000, 1000), torch.float32)
    assert larger.shape == (1000, 1000)
    assert first.eq(3).all()  # still in use, so still there
    release()
    larger.fill_(1)
    assert larger.sum() == 1e6
    assert scratch("here", (0, 5), torch.float32).shape == (0, 5)


def test_threads_have_blocks_of_their_own():
    mine = scratch("here", (8,), torch.float32)
    found = []
    thread = threading.Thread(target=lambda: found.append(scratch("here", (8,), torch.float32).data_ptr()))
    thread.start()
    thread.join()
    assert found != [mine.data_ptr()]


def test_a_dense_gradient_is_formed_where_the_last_one_was():
    dy, x = torch.randn(7, 5), torch.randn(7, 6)
    first = ops.weight_gradient(dy, x)
    assert torch.equal(first, dy.mT @ x)
    assert ops.weight_gradient(x, dy).data_ptr() == first.data_ptr()


class Attention(nn.Module):
    """Query, key and value of one input, and a fourth layer on another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, x):
        return self.o(torch.softmax(self.q(x) * self.k(x), -1) * self.v(x))


def test_layers_that_share_an_input_turn_it_once(monkeypatch):
    monkeypatch.setenv("SELECTUNE_BACKEND", "numba")
    turned = []
    launch = cpu.launch

    def count(loop, arguments, blocks):
        if loop == cpu._loop("loops", "pack", torch.float32):
            turned.append(arguments[2])
        launch(loop, arguments, blocks)

    monkeypatch.setattr(cpu, "launch", count)
    torch.manual_seed(0)
    model = Attention()
    tuner = st.attach(model, st.random(budget=0.1))
    values = tuner.parameters()[0]
    gradients = []
    for scale in (1.0, 2.0):
        turned.clear()
        model(scale * torch.arange(640.0).view(10, 64).sin()).square().sum().backward()
        assert len(turned) == 2  # one for q, k and v, one for o
        gradients.append(values.grad.clone())
        values.grad = None
    monkeypatch.setattr(cpu, "_same_memory", lambda a, b: False)
    for scale, wanted in zip((1.0, 2.0), gradients, strict=True):
        turned.clear()
        model(scale * torch.arange(640.0).view(10, 64).sin()).square().sum().backward()
        assert len(turned) == 4
        assert torch.equal(values.grad, wanted)
        values.grad = None


def test_an_input_changed_between_two_products_is_turned_anew():
    dy, x = torch.randn(200, 8), torch.randn(200, 8)
    rows, cols = torch.arange(8), torch.arange(8)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y

        @staticmethod
        def backward(ctx, grad):
            first = cpu.tiles(dy, x, rows, cols)
            x.mul_(2)
            assert torch.equal(cpu.tiles(dy, x, rows, cols), 2 * first)
            other = x.clone()
            assert torch.equal(cpu.tiles(dy, other, rows, cols), 2 * first)
            return grad

    Twice.apply(torch.ones((), requires_grad=True)).backward()
    cpu.end_pass()
