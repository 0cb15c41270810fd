"""The ranks' exchange of candidates chooses what the whole mean gradient would choose, on every rank."""

from __future__ import annotations

import os
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks_kit import in_ranks
from torch import Tensor, nn

import selectune as st
from selectune.scope import ScopedTensor
from selectune.select import GlobalCollector
from selectune.train.choose import shares
from selectune.train.choose.scan import scan
from selectune.train.world import World

CASES = int(os.environ.get("EXCHANGES", "32"))
SHAPES = ((150, 130), (20_003,), (64, 257))
SCORES = {
    "d3": st.scores.d3(),
    "gradient": st.scores.d3(exp=0.0),
    "sensitivity": st.scores.sensitivity(),
    "a user's": st.score(reads="gradient", above=0.0)(lambda weight, gradient: (gradient * gradient) * weight.abs())(),
}


def case(number: int, ranks: int) -> SimpleNamespace:
    """Tensors, the ranks' shares of each gradient, and what is asked for. Every rank draws the same."""
    rng, draw = random.Random(number), torch.Generator().manual_seed(number)
    dtype = rng.choice((torch.float32, torch.float64, torch.float64, torch.bfloat16))

    def heavy(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).pow(rng.choice((1, 3, 5)))

    tensors, given, taken = [], [], []
    for index, shape in enumerate(SHAPES):
        weight = nn.Parameter(heavy(*shape).to(dtype))
        padding = range(shape[-1]) if rng.random() < 0.3 else range(0)
        tensors.append(ScopedTensor(index, (str(index),), weight, padding))
        common = heavy(*shape) * rng.choice((0.0, 1.0, 3.0))
        given.append([(common + heavy(*shape)).to(dtype) for _ in range(ranks)])
        if rng.random() < 0.2:
            given[-1] = [share * 0 for share in given[-1]]
        taken.append(torch.randperm(weight.numel(), generator=draw)[: rng.choice((0, 5, 500))].sort().values)
    select = st.select.PerTensor() if rng.random() < 0.3 else st.select.GlobalTopK(rng.choice(("order", "random")))
    return SimpleNamespace(
        tensors=tensors, given=given, taken=taken, select=select, quota=rng.choice((1, 7, 60, 300, 3000)),
        score=SCORES[rng.choice(list(SCORES))], dtype=dtype,
    )  # fmt: skip


def of_the_ranks(rank: int, world: World, asked: SimpleNamespace) -> dict[str, Any]:
    collector = asked.select.collector(asked.quota, [t.parameter.numel() for t in asked.tensors], 3)
    ways = []
    for tensor, given, taken in zip(asked.tensors, asked.given, asked.taken, strict=True):
        seen, parts = world.part, [False]
        world.part = lambda share, parts=parts, seen=seen: (parts.append(True), seen(share))[1]  # pyright: ignore
        try:
            found = shares.offer(collector, asked.score, tensor, taken, given[rank], world)
        finally:
            world.part = seen  # pyright: ignore
        if found is None:
            found = scan(collector, asked.score, tensor, taken, world.mean(given[rank]))
            parts.append(None)
        assert found
        ways.append({False: "few", True: "parts", None: "whole"}[parts[-1]])
    tensors, flat, gradients = collector.close()
    return {"tensors": tensors.numpy(), "flat": flat.numpy(), "gradients": gradients.numpy(), "ways": ways}


def all_cases(rank: int, ranks: int) -> list[Any]:
    model = nn.Linear(1, 1)
    world = World(model, SimpleNamespace(offsets=torch.zeros(1)), dict, SimpleNamespace())  # pyright: ignore
    world._group = dist.new_group()
    found = [of_the_ranks(rank, world, case(number, ranks)) for number in range(CASES)]
    asked = case(1, ranks)
    asked.given[1][rank].view(-1)[77] = float("nan") if rank == 1 else 0.0
    collector = asked.select.collector(5, [t.parameter.numel() for t in asked.tensors], 3)
    broken = [
        shares.offer(collector, asked.score, asked.tensors[i], asked.taken[i], asked.given[i][rank], world)
        for i in range(3)
    ]
    ties = []
    for tie in ("order", "random"):
        equal = ScopedTensor(1, ("1",), nn.Parameter(torch.ones(20_001)))
        several, alone = (st.select.GlobalTopK(tie).collector(300, [7, 20_001], 3) for _ in range(2))
        shares.offer(several, asked.score, equal, None, torch.ones(20_001), world)
        scan(alone, asked.score, equal, None, torch.ones(20_001))
        ties.append(torch.equal(several.close()[1], alone.close()[1]))
    small = ScopedTensor(0, ("0",), nn.Parameter(torch.zeros(5)))
    whole = shares.offer(collector, asked.score, small, None, torch.zeros(5), world)
    return [*found, broken, whole, ties, bytes_sent(world)]


def bytes_sent(world: World) -> int:
    """What a rank gives to collectives for one tensor of 80,000 bytes, of which 40 entries of each rank stand out."""
    sent, reduce, gather, part = [], dist.all_reduce, dist.all_gather, world.part
    world.part = lambda share: (sent.append(share.nbytes), part(share))[1]  # pyright: ignore
    share = torch.full((20_000,), 1e-3)
    share[dist.get_rank() * 100 : dist.get_rank() * 100 + 40] = 1.0
    tensor = ScopedTensor(0, ("0",), nn.Parameter(torch.ones(20_000)))
    dist.all_reduce = lambda given, **more: (sent.append(given.nbytes), reduce(given, **more))[1]
    dist.all_gather = lambda parts, given, **more: (sent.append(given.nbytes), gather(parts, given, **more))[1]
    try:
        collector = st.select.GlobalTopK().collector(9, [20_000], 3)
        assert shares.offer(collector, SCORES["gradient"], tensor, None, share, world)
    finally:
        dist.all_reduce, dist.all_gather = reduce, gather
        world.part = part  # pyright: ignore
    return sum(sent)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request) -> tuple[int, list[list[Any]]]:
    found = in_ranks(request.param, all_cases, request.param, seconds=900)
    for answers in found:
        assert isinstance(answers, list), answers
    return request.param, found


@pytest.mark.parametrize("number", range(CASES))
def test_candidates_of_all_ranks_are_the_best_of_the_mean(ranks, number):
    count, found = ranks
    asked, first = case(number, count), found[0][number]
    for other in found[1:]:
        for name in ("tensors", "flat", "gradients"):
            assert np.array_equal(first[name], other[number][name])
    means = [sum(share.double() for share in given) / count for given in asked.given]
    scores = []
    for tensor, mean, taken in zip(asked.tensors, means, asked.taken, strict=True):
        score = asked.score(tensor.parameter.detach().double().view(-1), mean.reshape(-1))
        score[torch.cat((taken, torch.arange(len(tensor.padding))))] = -np.inf
        bound = -np.inf if asked.score.above is None else asked.score.above
        scores.append(score.masked_fill(score <= bound, -np.inf).numpy())
    chosen = [np.zeros(len(score), bool) for score in scores]
    for tensor, flat, gradient in zip(first["tensors"], first["flat"], first["gradients"], strict=True):
        assert not chosen[tensor][flat]
        chosen[tensor][flat] = True
        assert gradient == pytest.approx(float(means[tensor].view(-1)[flat]), rel=1e-6)
    sizes = [len(score) for score in scores]
    counts = asked.select.allocate(asked.quota, sizes) if isinstance(asked.select, st.select.PerTensor) else None
    groups = [[i] for i in range(3)] if counts else [[0, 1, 2]]
    for group, quota in zip(groups, counts or [asked.quota], strict=True):
        score, mine = np.concatenate([scores[i] for i in group]), np.concatenate([chosen[i] for i in group])
        possible = int((score > -np.inf).sum())
        assert mine.sum() == min(quota, possible)
        assert not (mine & (score == -np.inf)).any()
        if mine.any() and not mine.all():
            assert score[mine].min() >= score[~mine].max() * (1 - 1e-6)  # which of two near ties may depend on rounding


def test_all_ways_are_taken(ranks):
    ways = Counter(way for answers in ranks[1][0][:CASES] for way in answers["ways"])
    assert min(ways[way] for way in ("few", "parts", "whole")) > 10


def test_a_share_that_is_not_finite_breaks_the_selection_on_every_rank(ranks):
    for answers in ranks[1]:
        assert answers[CASES] == [True, False, True]


def test_lists_of_entries_travel_and_not_the_gradient(ranks):
    count, found = ranks
    for answers in found:
        assert 0 < answers[CASES + 3] <= 8 * (9 + 40) * (1 + count) + 64  # twice places, then gradients in float64


def test_equal_scores_are_told_apart_as_in_one_process(ranks):
    assert all(answers[CASES + 2] == [True, True] for answers in ranks[1])


def test_the_mean_of_a_small_tensor_is_formed_whole(ranks):
    assert all(answers[CASES + 1] is None for answers in ranks[1])


class EvenOnly(GlobalCollector):
    """A user's own rule on top of ours."""

    def offer(self, tensor: int, flat: Tensor | int, scores: Tensor, carry: Tensor | None = None) -> None:
        every = torch.arange(len(scores)) + flat if isinstance(flat, int) else flat
        super().offer(tensor, flat, scores.masked_fill(every % 2 == 1, -torch.inf), carry)


def of_even_entries(rank: int) -> list[int]:
    """The entries chosen; odd ones score best."""
    model = nn.Linear(1, 1)
    world = World(model, SimpleNamespace(offsets=torch.zeros(1)), dict, SimpleNamespace())  # pyright: ignore
    world._group = dist.new_group()
    tensor = ScopedTensor(0, ("0",), nn.Parameter(torch.ones(20_000)))
    gradient = torch.arange(20_000.0) + 30_000 * (torch.arange(20_000) % 2)
    collector = EvenOnly(9, [20_000], None)
    if not shares.offer(collector, SCORES["gradient"], tensor, None, gradient, world):
        scan(collector, SCORES["gradient"], tensor, None, world.mean(gradient))
    return collector.close()[1].tolist()


def test_a_subclass_of_our_collectors_is_offered_the_whole_mean():
    assert in_ranks(2, of_even_entries) == [list(range(19_998, 19_980, -2))] * 2
