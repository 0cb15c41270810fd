"""Several processes select the entries that one process would select on the whole batch, or say why they stop."""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks_kit import OneDiedError, exchange, in_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import selectune as st
from selectune.train import world

STEPS, ROWS, WIDTH = 6, 12, 8


def batch(number: int) -> Tensor:
    return torch.randn(ROWS, 5, WIDTH, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


class Net(nn.Module):
    """Two ways through it, so that a rank may leave a tensor out; one weight is used twice."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(11, WIDTH, dtype=torch.float64)
        self.into = nn.Linear(WIDTH, 16, dtype=torch.float64)
        self.norm = nn.LayerNorm(16, dtype=torch.float64)
        self.odd = nn.Linear(16, 16, dtype=torch.float64)
        self.out = nn.Linear(16, 3, dtype=torch.float64)

    def forward(self, x: Tensor, odd: bool = False) -> Tensor:
        x = x + self.words((x[..., 0].abs() * 5).long() % 11)
        x = torch.tanh(self.norm(self.into(x)))
        x = torch.tanh(self.odd(self.odd(x))) if odd else x
        return self.out(x)


METHODS: dict[str, Any] = {
    "id3": lambda: st.id3(60, STEPS),
    "id3 every other step": lambda: st.id3(60, STEPS, every=2),
    "chosen again": lambda: st.repeat_d3(30, STEPS),
    "one shot by gradients": lambda: st.static_d3(40),
    "by magnitude": lambda: st.pafi(40),
    "at random": lambda: st.random(40),
    "SpIEL-AG": lambda: st.spiel_ag(24, STEPS, every=2, window=1),
    "RigL": lambda: st.rigl(24, STEPS, every=2),
}


def trained(rank: int, name: str, setting: str, world: int) -> dict[str, Any]:
    """A few steps: the support after each, the weights at the end, and the events."""
    exchange(setting)
    model = Net()
    passes = 2 if "passes" in setting else 1
    around: Any = model
    if world > 1 and "late" in setting:
        around = DistributedDataParallel(model, gradient_as_bucket_view="view" in setting)
    tuner = st.attach(around, METHODS[name](), seed=3, accumulation_steps=passes)
    if world > 1 and "late" not in setting:
        around = DistributedDataParallel(model, gradient_as_bucket_view="view" in setting)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2, weight_decay=0.0)
    supports = []
    for step in range(STEPS):
        for one in range(passes):
            alone = world > 1 and one + 1 < passes
            rows = batch(10 * step + one).chunk(world)[rank]
            odd = "odd" in setting and (rank == 0 if world > 1 else True)
            with around.no_sync() if alone else contextlib.nullcontext():
                if "odd" in setting and world == 1:  # each half goes the way that its rank would go
                    first, second = batch(10 * step + one).chunk(2)
                    loss = (model(first, True).square().mean() + model(second, False).square().mean()) / 2
                else:
                    loss = around(rows, odd).square().mean()
                (loss / passes).backward()
        if "clip" in setting:
            nn.utils.clip_grad_norm_(tuner.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        supports.append({key: flat.tolist() for key, flat in tuner.support.items()})
    tuner.verify()
    return {
        "supports": supports,
        "weights": [p.detach().numpy() for p in model.parameters()],
        "events": dict(tuner.events),
    }


CASES = [(name, "") for name in METHODS] + [
    ("id3", "passes"),
    ("id3", "odd"),
    ("id3", "clip, view"),
    ("chosen again", "passes, clip"),
    ("SpIEL-AG", "passes"),
    ("id3", "late, passes, odd"),
    ("id3", "listed"),
    ("id3", "in parts, odd"),
    ("chosen again", "listed, passes"),
    ("RigL", "in parts, late"),
]
RANDOM = int(os.environ.get("TRIALS", "12"))


def _drawn(number: int) -> tuple[str, str]:
    """A method and settings."""
    draw = random.Random(number)
    parts = [part for part in ("passes", "clip", "view", "odd", "late", "listed", "in parts") if draw.random() < 0.4]
    return draw.choice(sorted(METHODS)), ", ".join([*parts, f"draw {number}"])


CASES += [_drawn(number) for number in range(RANDOM)]


def many(rank: int, world: int) -> list[dict[str, Any]]:
    return [trained(rank, name, setting, world) for name, setting in CASES]


def loop(rank: int, tuner: st.Tuner, model: Any, steps: int = STEPS, averaged: bool = False) -> st.Tuner:
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for step in range(steps):
        model(batch(step).chunk(2)[rank]).square().mean().backward()
        if averaged:
            for parameter in tuner.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
    return tuner


def by_hand(rank: int) -> Any:
    model = Net()
    tuner = loop(rank, st.attach(model, st.id3(60, STEPS)), model, averaged=True)
    return {name: flat.tolist() for name, flat in tuner.support.items()}


def nobody_averages(rank: int) -> Any:
    model = Net()
    loop(rank, st.attach(model, st.id3(60, STEPS)), model)


def another_seed(rank: int) -> Any:
    st.attach(Net(), st.random(40), seed=rank)


def another_base(rank: int) -> Any:
    model = Net()
    with torch.no_grad():
        model.norm.bias[3] += rank
    st.attach(model, st.id3(60, STEPS))


def another_model(rank: int) -> Any:
    model = Net()
    if rank:
        model.more = nn.Linear(2, 2)
    st.attach(model, st.id3(60, STEPS))


def another_budget(rank: int) -> Any:
    st.attach(Net(), st.id3(60 + rank, STEPS))


def wrapped_before(rank: int) -> Any:
    model = Net()
    around = DistributedDataParallel(model)
    loop(rank, st.attach(model, st.id3(60, STEPS)), around)


def static(rank: int) -> Any:
    st.attach(DistributedDataParallel(Net(), static_graph=True), st.id3(60, STEPS))


def joined(rank: int) -> Any:
    model = Net()
    tuner = st.attach(model, st.id3(60, STEPS))
    around = DistributedDataParallel(model)
    with around.join():
        loop(rank, tuner, around, STEPS - rank)


def dense_phase(rank: int) -> Any:
    st.attach(Net(), st.lt_sft(60, STEPS))


def sharded(rank: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Net()
    tuner = st.attach(model, st.id3(60, STEPS))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    loop(rank, tuner, model)


def flipped_support(rank: int) -> Any:
    model = Net()
    tuner = st.attach(model, st.id3(60, STEPS))
    around = DistributedDataParallel(model)
    loop(rank, tuner, around, 2)
    if rank == 1:
        page = tuner.engine.ledger.pages[1]
        page.flat[-1] ^= 1
    loop(rank, tuner, around, 2)


def flipped_offset(rank: int) -> Any:
    model = Net()
    tuner = st.attach(model, st.id3(60, STEPS))
    around = DistributedDataParallel(model)
    loop(rank, tuner, around, 2)
    if rank == 1:
        with torch.no_grad():
            tuner.parameters()[0][3] += 1e-9
    loop(rank, tuner, around, 2)


def other_calibration(rank: int) -> Any:
    model = Net()
    data = [batch(100 * rank + k)[:1] for k in range(8)]
    st.attach(model, st.fish(40, examples=8), calibration=data, loss=lambda model, x: model(x).square().mean())


def traffic(rank: int) -> list[int]:
    """The bytes that this rank gives to collectives in each step: its own, and those of DistributedDataParallel."""
    sent, reduce, gather = [0], dist.all_reduce, dist.all_gather

    def count(tensor: Tensor) -> None:
        sent[-1] += tensor.numel() * tensor.element_size()

    def hook(state, bucket):  # torch reads annotations and refuses others
        count(bucket.buffer())
        return allreduce_hook(state, bucket)

    def counted_reduce(tensor: Tensor, **more: Any) -> Any:
        count(tensor)
        return reduce(tensor, **more)

    def counted_gather(parts: Any, tensor: Tensor, **more: Any) -> Any:
        count(tensor)
        return gather(parts, tensor, **more)

    model = Net().float()
    tuner = st.attach(model, st.id3(60, STEPS, every=2))
    around = DistributedDataParallel(model)
    around.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    world.dist.all_reduce, world.dist.all_gather = counted_reduce, counted_gather  # pyright: ignore
    try:
        for step in range(STEPS):
            around(batch(step).float().chunk(2)[rank]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            sent.append(0)
    finally:
        world.dist.all_reduce, world.dist.all_gather = reduce, gather  # pyright: ignore
    return [*sent[:-1], sum(p.numel() for p in model.parameters())]


PLANTED = {  # what a rank does wrong, or all of them: the words of the error that every rank raises
    nobody_averages: "Nothing averages the gradients: run the model inside DistributedDataParallel",
    another_seed: r"The ranks are not attached to the same seed: rank 1 differ",
    another_base: r'not attached to the same weight "norm\.bias": rank 1 differ',
    another_model: "rank 1 have other tensors",
    another_budget: "not attached to the same method",
    wrapped_before: "give attach the DistributedDataParallel itself",
    static: "static_graph=True",
    joined: "Give every process as many batches",
    dense_phase: "trains every entry for a while",
    sharded: "sharded between the processes",
    flipped_support: "not training the same support",
    flipped_offset: "not training the same offsets",
    other_calibration: "calibration data",
}


def all_planted(rank: int) -> list[Any]:
    found: list[Any] = [(by_hand(rank), traffic(rank))]
    for work in PLANTED:
        try:
            work(rank)
            found.append("no error")
        except Exception as error:  # noqa: BLE001  (whatever it is, the test shows it)
            found.append(f"{type(error).__name__}: {error}")
    return found


def dying(rank: int, when: str) -> Any:
    """Rank 1 dies; rank 0 must not wait for it. Gives its error, and the seconds from the death to it."""
    model = Net()
    tuner = st.attach(model, st.id3(60, STEPS))
    around = DistributedDataParallel(model)
    loop(rank, tuner, around, 2)
    if rank == 1:
        if when == "in backward":
            model.into.register_full_backward_hook(lambda *_: os._exit(9))
        else:
            os._exit(9)
    began = time.perf_counter()
    try:
        loop(rank, tuner, around, 2)
    except RuntimeError as error:
        return type(error).__name__, str(error), time.perf_counter() - began
    return None


@pytest.fixture(scope="module")
def both() -> list[list[dict[str, Any]]]:
    return in_ranks(2, many, 2)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{name}, {setting}".strip(", ") for name, setting in CASES])
def test_two_ranks_select_what_one_process_selects(both, case):
    for answer in both:
        assert isinstance(answer, list), answer
    name, setting = CASES[case]
    alone = trained(0, name, setting, 1)
    first, second = both[0][case], both[1][case]
    assert first["supports"] == second["supports"] == alone["supports"]
    for mine, other, one in zip(first["weights"], second["weights"], alone["weights"], strict=True):
        assert np.array_equal(mine, other)
        np.testing.assert_allclose(mine, one, rtol=1e-9, atol=1e-12)
    assert first["events"] == alone["events"]


@pytest.fixture(scope="module")
def planted() -> list[list[Any]]:
    return in_ranks(2, all_planted)


@pytest.mark.parametrize("number", range(len(PLANTED)), ids=[work.__name__ for work in PLANTED])
def test_what_would_let_the_ranks_drift_apart_is_an_error_on_every_rank(planted, number):
    for answers in planted:
        assert isinstance(answers, list), answers
        assert re.match(rf"TunerError: .*{list(PLANTED.values())[number]}", answers[number + 1]), answers[number + 1]


def test_a_loop_may_average_the_gradients_itself(planted, both):
    alone = trained_by_sgd()
    assert planted[0][0][0] == planted[1][0][0] == alone


def test_only_a_selecting_step_sends_more_than_the_offsets(planted):
    *steps, weights = planted[0][0][1]
    assert all(sent <= 4 * 60 + 4096 for sent in steps[1::2])  # float32 offsets, and what is compared
    assert all(4 * weights / 2 < sent <= 4 * weights + 4096 for sent in steps[::2])  # one dense tensor after another


def trained_by_sgd() -> Any:
    model = Net()
    tuner, optimizer = st.attach(model, st.id3(60, STEPS)), None
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for step in range(STEPS):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: flat.tolist() for name, flat in tuner.support.items()}


@pytest.mark.parametrize("when", ["between steps", "in backward"])
def test_a_rank_that_dies_stops_the_others(when):
    with pytest.raises(OneDiedError) as found:
        in_ranks(2, dying, when)
    assert found.value.answers.keys() == {0}
    assert found.value.answers[0][0] in ("RuntimeError", "DistBackendError")
    assert found.value.answers[0][2] < 60
