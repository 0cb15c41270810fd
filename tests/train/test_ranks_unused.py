"""Tensors that not every rank uses: what is selected, and what is trained in full, is by the mean all the same."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from ranks_kit import in_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import selectune as st

STEPS, WIDTH = 3, 8


def batch(number: int) -> Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(WIDTH, 16, dtype=torch.float64)
        self.heads = nn.ModuleList(nn.Linear(16, 3, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor, head: int) -> Tensor:
        return self.heads[head](torch.tanh(self.into(x)))


def with_own_heads(rank: int, late: bool) -> list[Any]:
    """Each rank uses a head of its own, and none the third; the weights at the end."""
    model, method = Heads(), st.id3(20, STEPS, train_fully="heads.*")
    around: Any = DistributedDataParallel(model, find_unused_parameters=True) if late else model
    tuner = st.attach(around, method, accumulation_steps=2)
    around = around if late else DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for step in range(STEPS):
        for one in range(2):
            with around.no_sync() if one == 0 else contextlib.nullcontext():
                around(batch(2 * step + one).chunk(2)[rank], (rank + one) % 2).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().numpy() for parameter in model.parameters()]


def test_heads_that_only_some_ranks_use_are_averaged_also_if_attached_late():
    early, late = in_ranks(2, with_own_heads, False), in_ranks(2, with_own_heads, True)
    for other in (early[1], *late):
        assert all(np.array_equal(a, b) for a, b in zip(early[0], other, strict=True))


class Last(nn.Module):
    """A rank may leave out the last layer, so that the ranks are at different tensors all the way back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(3)))
        self.last = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor, whole: bool) -> Tensor:
        x = self.layers(x)
        return self.last(x) if whole else x


def selected(rank: int, ranks: int) -> list[Any]:
    """What each step has selected."""
    model = Last()
    tuner = st.attach(model, st.id3(60, STEPS))
    around = DistributedDataParallel(model) if ranks > 1 else model
    optimizer, found = torch.optim.SGD(tuner.parameters(), lr=0.1), []
    for step in range(STEPS):
        halves = [(batch(step).chunk(2)[i], i == 0) for i in range(2)]
        mine = halves if ranks == 1 else [halves[rank]]
        (sum((around(*half).square().mean() for half in mine), torch.zeros(())) / len(mine)).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: flat.tolist() for name, flat in tuner.support.items()})
    return found


def test_gradients_that_wait_for_the_other_ranks_stay_what_they_are():
    assert in_ranks(2, selected, 2) == [selected(0, 1)] * 2


def after_a_broken_pass(rank: int, ranks: int) -> list[Any]:
    """What is selected once a pass has broken off in which each rank used a head of its own."""
    model = Heads()
    tuner = st.attach(model, st.id3(60, STEPS))
    around = DistributedDataParallel(model) if ranks > 1 else model

    def breaks(gradient: Tensor) -> None:
        raise ValueError

    if ranks > 1:
        hidden = torch.tanh(model.into(batch(9)))
        hidden.register_hook(breaks)
        with contextlib.suppress(ValueError):
            (1000 * model.heads[rank](hidden).square().mean()).backward()
    optimizer, found = torch.optim.SGD(tuner.parameters(), lr=0.1), []
    for step in range(STEPS):
        halves = batch(step).chunk(2)
        mine = halves if ranks == 1 else [halves[rank]]
        (sum((around(half, 0).square().mean() for half in mine), torch.zeros(())) / len(mine)).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: flat.tolist() for name, flat in tuner.support.items()})
    return found


def test_gradients_that_wait_are_void_if_the_pass_breaks_off():
    assert in_ranks(2, after_a_broken_pass, 2) == [after_a_broken_pass(0, 1)] * 2
