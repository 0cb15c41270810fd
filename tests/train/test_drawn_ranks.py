"""Drawn runs in two, three or four processes, replicated and sharded: at each step the support of one process."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from fsdp_kit import METHODS, STEPS, Run
from ranks_kit import in_ranks
from test_ranks import Net as Plain
from test_ranks import batch as rows
from test_ranks import loop
from torch.nn.parallel import DistributedDataParallel

import selectune as st

RUNS = int(os.environ.get("RUNS", "4"))
RANKS = tuple(map(int, os.environ.get("RANKS", "2").split(",")))
SETTINGS = (
    "dropout",
    "passes",
    "amp",
    "uneven",
    "clip",
    "late",
    "short at the end",
    "keeps whole weights",
    "whole head",
    "listed",
    "in parts",
)


def drawn(number: int) -> tuple[int, str, str]:
    """How many ranks, a method and settings."""
    draw, ranks = random.Random(f"ranks {number}"), RANKS[number % len(RANKS)]
    parts = [part for part in SETTINGS if draw.random() < 0.4]
    if ranks == 3 and "amp" in parts:  # one process divides the loss by 3, and bfloat16 rounds other gradients then
        parts.remove("amp")
    return ranks, draw.choice(sorted(METHODS)), ", ".join(parts)


def both_ways(rank: int, cases: list[tuple[int, str, str]]) -> list[dict[str, Any]]:
    return [
        {way: Run(rank, way, name, setting).take(*range(STEPS)).answer() for way in ("ddp", "fsdp")}
        for _, name, setting in cases
    ]


CASES = [drawn(number) for number in range(RUNS)]


@pytest.fixture(scope="module")
def answers() -> dict[int, Any]:
    """By the number of a case: what each rank answers."""
    found: dict[int, Any] = {}
    for ranks in sorted(set(RANKS)):
        numbers = [number for number, case in enumerate(CASES) if case[0] == ranks]
        given = in_ranks(ranks, both_ways, [CASES[number] for number in numbers], seconds=1800)
        for answer in given:
            assert isinstance(answer, list), answer
        found |= dict(zip(numbers, zip(*given, strict=True), strict=True))
    return found


@pytest.mark.parametrize("number", range(RUNS), ids=[f"{ranks} {name}, {how}" for ranks, name, how in CASES])
def test_support_of_one_process(answers, number):
    ranks, name, setting = CASES[number]
    one = Run(0, "one", name, setting, ranks=ranks).take(*range(STEPS)).answer()
    close = {"rtol": 1e-4, "atol": 1e-5} if "amp" in setting else {"rtol": 1e-9, "atol": 1e-12}
    for way in ("ddp", "fsdp"):
        first = answers[number][0]["ddp" if ranks == 2 else way]  # sums of more than two numbers depend on their order
        for answer in answers[number]:
            assert answer[way]["supports"] == one["supports"], way
            assert np.array_equal(answer[way]["offsets"], first["offsets"]), way
            assert answer[way]["file"] == first["file"], way
        for key, weight in first["weights"].items():
            np.testing.assert_allclose(weight, one["weights"][key], **close)


def either_order(rank: int) -> list[Any]:
    """What two runs give that attach before and after DistributedDataParallel, and what is averaged after detach."""
    found = []
    method = st.id3(60, STEPS, every=2, scope=st.Scope(train_fully="out.*"))
    for late in (False, True):
        model = Plain()
        model.norm.register_buffer("seen", torch.zeros(1))
        around: Any = DistributedDataParallel(model) if late else model
        tuner = st.attach(around, method)
        around = around if late else DistributedDataParallel(model)
        found.append(loop(rank, tuner, around).delta().to_bytes())
        model.norm.seen.fill_(rank)  # each forward brings the first rank's
        around(rows(0)).mean().backward()
        found.append(model.norm.seen.item())
    tuner.detach()
    around(rows(0).chunk(2)[rank], odd=True).square().mean().backward()
    return [found[:2] == found[2:], model.into.weight.grad.abs().sum().item(), found[3]]


@pytest.fixture(scope="module")
def ordered() -> list[list[Any]]:
    return in_ranks(2, either_order)


def test_a_tuner_may_come_after_the_wrapper(ordered):
    """The same bits, buffers synchronised as before, and a wrapper that averages again once the tuner is off."""
    (first, mine, seen), (second, other, also) = ordered
    assert (first, second) == (True, True)
    assert mine == other != 0.0
    assert seen == also == 0.0
