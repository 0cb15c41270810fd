"""A tuner put back to an earlier step of its own run, in the same process: everything is as it was, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from train_kit import bits, same

import selectune as st
from selectune.errors import OptimizerError, TunerError

STEPS = 6
HEAD = st.Scope(train_fully=("last.*",))


class Net(torch.nn.Module):
    """With a buffer that training moves, and a tensor that may be trained whole."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 12)
        self.norm = torch.nn.BatchNorm1d(12)
        self.last = torch.nn.Linear(12, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh())


def loss_of(model, number):
    generator = torch.Generator().manual_seed(int(number))
    x, y = torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    return torch.nn.functional.cross_entropy(model(x), y)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def entries(parameters):
    return st.SparseAdamW(parameters, lr=1e-2, age="entry")


def sm3(parameters):
    return st.SparseSM3(parameters, lr=1e-2)


CASES = {
    "id3": (lambda: st.id3(30, STEPS), adamw, 1),
    "id3 and a head": (lambda: st.id3(30, STEPS, scope=HEAD), adamw, 2),
    "repeat-d3": (lambda: st.repeat_d3(30, STEPS), adamw, 1),
    "pafi": (lambda: st.pafi(30), adamw, 1),
    "increment-pafi": (lambda: st.increment_pafi(30, STEPS), adamw, 1),
    "random": (lambda: st.random(30), adamw, 1),
    "fish": (lambda: st.fish(30, examples=3), adamw, 1),
    "fish-dip": (lambda: st.fish_dip(30, STEPS, every=2, examples=2), adamw, 1),
    "rigl": (lambda: st.rigl(30, STEPS, every=2), adamw, 2),
    "set": (lambda: st.sparse_evolution(30, STEPS, every=2), adamw, 1),
    "spiel-ag": (lambda: st.spiel_ag(30, STEPS, every=3, window=2), entries, 1),
    "spiel-ma": (lambda: st.spiel_ma(30, STEPS, every=3, window=2), sm3, 1),
    "lt-sft": (lambda: st.lt_sft(30, STEPS, dense=3, scope=HEAD), adamw, 1),
    "lt-sft, rounds": (lambda: st.lt_sft(30, STEPS, dense=1, rounds=2), adamw, 1),
    "diff-pruning": (lambda: st.diff_pruning(30, STEPS, dense=3), adamw, 1),
    "child-tuning-f": (lambda: st.child_tuning_f(p=0.3), adamw, 1),
    "sparse-adapter": (lambda: st.sparse_adapter(30, score="magnitude"), adamw, 1),
    "full": (lambda: st.full(), adamw, 1),
}


class Run:
    def __init__(self, make, optimizer, accumulation):
        torch.manual_seed(0)
        self.model, self.accumulation = Net(), accumulation
        method, how = make(), {}
        if method.score is not None and method.score.reads.calibrated:
            how = {"calibration": list(range(100, 104)), "loss": loss_of}
        self.tuner = st.attach(self.model, method, accumulation_steps=accumulation, **how)
        self.optimizer = optimizer(self.tuner.parameters())

    def backward(self, number):
        loss_of(self.model, number).backward()

    def go(self, first, last):
        for step in range(first, last):
            for k in range(self.accumulation):
                self.backward(step * self.accumulation + k)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def saved(self):
        return self.tuner.state_dict(), copy.deepcopy(self.optimizer.state_dict())

    def put_back(self, saved):
        self.tuner.load_state_dict(saved[0])
        self.optimizer.load_state_dict(copy.deepcopy(saved[1]))


def without_norm(found):
    """Without the buffers that a forward pass moves."""
    return {name: tensor for name, tensor in found.items() if not name.startswith("norm.")}


def same_state(a, b):
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    assert a["info"] == b["info"]
    assert a["tensors"].keys() == b["tensors"].keys()
    for key, tensor in a["tensors"].items():
        width = ints[tensor.element_size()]
        assert torch.equal(tensor.view(width), b["tensors"][key].view(width)), key


@pytest.mark.parametrize("case", CASES)
def test_every_step_can_be_gone_back_to(case, tries):
    tries(STEPS + 1)
    run = Run(*CASES[case])
    points = []
    for step in range(STEPS):
        points.append((run.saved(), bits(run.model)))
        run.go(step, step + 1)
    points.append((run.saved(), bits(run.model)))
    delta = run.tuner.delta(allow_empty=True).to_bytes()
    for step in (4, 0, 5, 2, 3, STEPS, 1):  # back and forth
        saved, weights = points[step]
        run.put_back(saved)
        assert same(bits(run.model), weights), step
        same_state(run.tuner.state_dict(), saved[0])
        run.go(step, STEPS)
        assert same(bits(run.model), points[STEPS][1]), step
        same_state(run.tuner.state_dict(), points[STEPS][0][0])
        assert run.tuner.delta(allow_empty=True).to_bytes() == delta
    run.tuner.detach()
    torch.manual_seed(0)
    assert same(bits(run.model), bits(Net()))


@pytest.mark.parametrize("case", ["id3", "rigl", "repeat-d3"])
def test_from_within_a_window(case):
    """Half a window, or a window that waits for its step, is dropped together with its gradient."""
    make, optimizer, _ = CASES[case]
    run, straight = Run(make, optimizer, 2), Run(make, optimizer, 2)
    straight.go(0, STEPS)
    run.go(0, 2)
    saved = run.saved()
    for passes in (1, 2):
        for number in range(passes):
            run.backward(900 + number)
        run.put_back(saved)
        assert run.tuner.step == 2
        run.go(2, STEPS)
        assert same(bits(run.model), bits(straight.model))
        assert run.tuner.events == straight.tuner.events


@pytest.mark.parametrize("case", ["lt-sft", "diff-pruning"])
def test_a_gradient_of_the_dense_phase_is_dropped(case):
    """An optimizer that steps after it takes no step of the run."""
    run = Run(*CASES[case])
    run.go(0, 1)
    saved = run.saved()
    run.backward(900)
    run.put_back(saved)
    run.optimizer.step()
    assert run.tuner.step == 1
    run.go(1, STEPS)
    straight = Run(*CASES[case])
    straight.go(0, STEPS)
    assert same(bits(run.model), bits(straight.model))


def test_not_within_a_step():
    run = Run(*CASES["pafi"])
    state = run.tuner.state_dict()

    def closure():
        run.optimizer.zero_grad()
        run.tuner.load_state_dict(state)

    with pytest.raises(TunerError, match=r"optimizer\.step\(\) is running"):
        run.optimizer.step(closure)


# -- an optimizer that knows more steps than its tuner


@pytest.mark.parametrize("case", ["id3", "pafi", "spiel-ag", "spiel-ma", "lt-sft", "diff-pruning"])
def test_an_optimizer_without_its_tuners_state(case):
    run = Run(*CASES[case])
    run.go(0, 2)
    _, moments = run.saved()
    fresh = Run(*CASES[case])
    fresh.optimizer.load_state_dict(moments)
    before = bits(fresh.model)
    fresh.backward(0)
    with pytest.raises(OptimizerError, match=r"behind it .* the tuner is at step 0.*tuner\.load_state_dict"):
        fresh.optimizer.step()
    assert same(without_norm(bits(fresh.model)), without_norm(before))


def test_with_momentum_alone():
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)

    run = Run(CASES["id3"][0], sgd, 1)
    run.go(0, 2)
    fresh = Run(CASES["id3"][0], sgd, 1)
    fresh.optimizer.load_state_dict(run.saved()[1])
    fresh.backward(0)
    with pytest.raises(OptimizerError, match="has steps behind it"):
        fresh.optimizer.step()


def test_back_at_the_beginning_with_the_moments_of_later():
    run = Run(*CASES["id3"])
    state, moments = run.saved()
    run.go(0, 3)
    run.tuner.load_state_dict(state)
    run.backward(0)
    with pytest.raises(OptimizerError, match=r"has 3 steps behind it"):
        run.optimizer.step()
    run.optimizer.load_state_dict(moments)
    run.optimizer.zero_grad()
    run.go(0, 2)
    assert run.tuner.step == 2


def test_optimizers_with_a_past_of_their_own():
    """An optimizer that trained something else, or stepped on zeros before, is accepted at step 0."""
    other = torch.nn.Linear(3, 3)
    optimizer = adamw(other.parameters())
    for _ in range(3):
        other(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    run = Run(CASES["id3 and a head"][0], lambda parameters: optimizer, 1)
    optimizer.add_param_group({"params": run.tuner.parameters()})
    run.go(0, STEPS)
    assert run.tuner.step == STEPS

    run = Run(*CASES["id3"])
    for parameter in run.tuner.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    run.go(0, STEPS)
    assert run.tuner.step == STEPS

    model = Net()  # a head that the same optimizer trained before attach
    optimizer = adamw(model.last.parameters())
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    tuner = st.attach(model, st.id3(30, STEPS, scope=HEAD))
    optimizer.add_param_group({"params": tuner.parameters()[:1]})
    loss_of(model, 1).backward()
    optimizer.step()
    assert tuner.step == 1
