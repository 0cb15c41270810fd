"""The stream of patches: replicas hold the trainer's bits after every step, and nobody keeps a copy of the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import selectune as st
from selectune.errors import BaseMismatchError, ConfigError, DeltaError, DeltaStateError, NonFiniteError, TunerError
from selectune.interop.patches import WeightUpdate, places
from selectune.interop.sync import Entries, PatchStream, Replica, moved

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def net(dtype: torch.dtype = torch.float32, width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4)).to(dtype)


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(bits(p), bits(theirs[n])) for n, p in a.named_parameters() if n in theirs)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


class Trainer:
    def __init__(self, model: nn.Module, method: st.Method, lr: float = 0.05) -> None:
        self.model, self.tuner = model, st.attach(model, method)
        self.optimizer = st.SparseAdamW(self.tuner.parameters(), lr=lr)

    def step(self) -> None:
        x = torch.randn(5, 6, dtype=next(self.model.parameters()).dtype)
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


METHODS = {
    "id3": lambda: st.id3(budget=30, steps=6),
    "repeat": lambda: st.repeat_d3(budget=20, steps=6),
    "drop and grow": lambda: st.rigl(budget=30, steps=6, every=2),
    "static": lambda: st.random(budget=25),
    "whole tensors": lambda: st.pafi(budget=10, scope=st.Scope(train_fully="2.bias")),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replica_holds_the_trainers_bits_after_every_step(method, dtype):
    model = net(dtype)
    base, replica = copy.deepcopy(model), Replica(copy.deepcopy(model))
    trainer = Trainer(model, METHODS[method]())
    stream, updates = PatchStream(trainer.tuner), []
    for _ in range(6):
        trainer.step()
        update = stream.update()
        replica.apply(WeightUpdate.from_bytes(update.to_bytes()))
        updates.append(update)
        assert same(replica.model, model)
        assert replica.version == stream.version
        assert update.scalars <= 2 * trainer.tuner.trained + 30
    late = Replica(copy.deepcopy(base))
    late.apply(stream.catch_up())
    assert same(late.model, model)
    assert late.version == stream.version
    for update in reversed(updates):
        replica.apply(update.reverse())
    assert same(replica.model, base)
    assert replica.version == stream.base


def test_ten_thousand_random_chains_are_bit_equal():
    """Entries come, move, go back to the base and come again; zeros of both signs are among them."""
    source = torch.Generator().manual_seed(7)

    def draw(high: int, count: int) -> Tensor:
        return torch.randint(0, high, (count,), generator=source)

    for chain in range(10_000):
        dtype = FLOATS[chain % 4]
        base = torch.randn(9, generator=source).to(dtype)
        weight, server, sent, undo = base.clone(), base.clone(), None, []
        for _ in range(2):
            flat = torch.unique(draw(9, 4))
            weight.copy_(base)
            weight[flat] = torch.randn(flat.numel(), generator=source).mul(draw(3, flat.numel())).to(dtype)
            found, sent = moved(sent, flat, base[flat], weight.__getitem__)
            server[found.flat] = found.new
            undo.append(found)
            assert torch.equal(bits(server), bits(weight)), chain
        for found in reversed(undo):
            server[found.flat] = found.old
        assert torch.equal(bits(server), bits(base)), chain


@settings(max_examples=20)
@given(some.lists(some.sampled_from(["step", "update", "skip", "clone"]), min_size=1, max_size=9), some.integers(0, 4))
def test_any_order_of_steps_and_updates_ends_in_the_same_bits(order, which):
    model = net(width=4)
    replica = Replica(copy.deepcopy(model))
    trainer = Trainer(model, list(METHODS.values())[which]())
    stream = PatchStream(trainer.tuner)
    for what in order:
        if what == "step" and (trainer.tuner.steps is None or trainer.tuner.step < trainer.tuner.steps):
            trainer.step()
        elif what == "update":
            replica.apply(stream.update())
            assert same(replica.model, model)
        elif what == "skip":  # the gradient is thrown away
            model(torch.randn(5, 6)).sum().backward()
            trainer.optimizer.zero_grad()
    replica.apply(stream.update())
    assert same(replica.model, model)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        view = isinstance(made, Tensor) and any(
            isinstance(a, Tensor) and a.untyped_storage().data_ptr() == made.untyped_storage().data_ptr() for a in args
        )
        if isinstance(made, Tensor) and not view:
            self.most = max(self.most, made.numel())
        return made


def test_an_update_makes_nothing_of_the_models_size():
    model = net(width=5000)
    trainer = Trainer(model, st.id3(budget=40, steps=4))
    stream = PatchStream(trainer.tuner)
    for _ in range(4):
        trainer.step()
        with Largest() as seen:
            stream.update().to_bytes()
        assert seen.most <= 400, "more than O(B)"
    with Largest() as seen:
        model.get_parameter("0.weight").detach().clone()
    assert seen.most == 30_000, "the mode sees a copy"


def test_an_update_between_two_passes_of_a_step_is_refused():
    model = net()
    tuner = st.attach(model, st.id3(budget=9, steps=3), accumulation_steps=2)
    stream = PatchStream(tuner)
    model(torch.randn(2, 6)).sum().backward()
    with pytest.raises(TunerError, match="between steps"):
        stream.update()


def test_a_lost_a_repeated_and_a_strange_update_are_refused():
    model = net()
    replica, before = Replica(copy.deepcopy(model)), copy.deepcopy(model)
    trainer = Trainer(model, st.id3(budget=30, steps=3))
    stream = PatchStream(trainer.tuner)
    trainer.step()
    first = stream.update()
    trainer.step()
    second = stream.update()
    with pytest.raises(BaseMismatchError, match="one was left out, came twice, or is for another base"):
        replica.apply(second)
    assert same(replica.model, before)
    replica.apply(first)
    with pytest.raises(BaseMismatchError, match="came twice"):
        replica.apply(first)
    other = Replica(net(width=13), version=first.base)
    kept = copy.deepcopy(other.model)
    with pytest.raises(BaseMismatchError, match="Nothing was written"):
        other.apply(first)
    assert same(other.model, kept)
    assert other.version == first.base
    replica.apply(second)
    assert same(replica.model, model)


def test_nan_is_not_sent_and_the_stream_goes_on():
    model = net()
    replica = Replica(copy.deepcopy(model))
    trainer = Trainer(model, st.random(budget=8))
    stream = PatchStream(trainer.tuner)
    trainer.step()
    offsets = trainer.tuner.parameters()[0]
    kept = offsets.detach().clone()
    with torch.no_grad():
        offsets[0] = float("nan")
    trainer.tuner.engine.ledger.write_weights()
    with pytest.raises(NonFiniteError, match="unchanged"):
        stream.update()
    with torch.no_grad():
        offsets.copy_(kept)
    trainer.tuner.engine.ledger.write_weights()
    replica.apply(stream.update())
    assert same(replica.model, model)


def test_the_served_dtype_must_hold_every_value():
    trainer = Trainer(net(), st.random(budget=8))
    stream = PatchStream(trainer.tuner, dtype=torch.bfloat16)
    trainer.step()
    with pytest.raises(DeltaError, match="are no BF16 numbers"):
        stream.update()


def test_names_of_the_server():
    model = net()
    trainer = Trainer(model, st.random(budget=20))
    served = nn.ModuleDict({"up": copy.deepcopy(model[0]), "down": copy.deepcopy(model[2])})
    names = {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in (("0", "up"), ("2", "down")) for leaf in ("weight", "bias")}
    stream = PatchStream(trainer.tuner, names)
    trainer.step()
    update = stream.update()
    assert {patch.name for patch in update.patches} <= set(names.values())
    Replica(served, stream.base).apply(update)
    assert torch.equal(served.get_parameter("up.weight"), model.get_parameter("0.weight"))


def test_refusals():
    tensor = Entries(torch.tensor([0]), torch.zeros(1), torch.ones(1))
    assert moved(tensor, torch.tensor([0]), torch.zeros(1), lambda at: torch.ones(1))[0].flat.numel() == 0
    with pytest.raises(DeltaError, match="int32 places reach"):
        places("w", torch.tensor([3]), 2**31 + 1)
    places("w", torch.tensor([3]), 2**31)
    x = [torch.randn(4, 6)]
    pruned = st.attach(net(), st.sparse_adapter(budget=9), calibration=x, loss=lambda m, b: m(b).sum())
    with pytest.raises(ConfigError, match="cannot follow it by patches"):
        PatchStream(pruned)
    dense = st.attach(net(), st.lt_sft(budget=9, steps=4))
    stream = PatchStream(dense)
    with pytest.raises(DeltaStateError, match="every entry is being trained now"):
        stream.update()
    norm = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    trainer = Trainer(norm, st.random(budget=5))
    stream = PatchStream(trainer.tuner)
    trainer.step()
    with pytest.raises(DeltaStateError, match=r"buffers changed.*running_mean"):
        stream.update()
