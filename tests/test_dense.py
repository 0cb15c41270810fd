"""Dense phases as values: gates and masks against literal vectors and autograd, rounds against their description."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

import selectune as st
from selectune.errors import BudgetError, ConfigError, ScheduleError
from selectune.phases import Gates, Here, Weights
from selectune.schedule import OneShot, Rounds
from selectune.seeds import Stream, uniform


def one(value):
    return torch.tensor([value], dtype=torch.float64)


# -- methods 2.9: gates


@pytest.mark.parametrize(
    ("alpha", "u", "s", "z", "slope"),
    [(0.0, 0.5, 0.5, 0.0, 0.0), (5.0, 0.5, 0.99331, 1.0, 0.0), (0.0, 0.6, 0.6, 0.3, 0.72)],
)
def test_gates_vectors(alpha, u, s, z, slope):
    found = [v.item() for v in Gates().gate(one(alpha), one(u))]
    assert found == pytest.approx([s, z, slope], abs=5e-6)


def test_gates_that_are_drawn_at_the_edge_stay_finite():
    for u in (0.0, 1.0):
        s, z, slope = Gates().gate(one(0.0), one(u))
        assert s.item() == pytest.approx(abs(u - 1e-4))
        assert (z.item(), slope.item()) == (u, 0.0)


def test_the_chance_that_a_gate_is_open():
    """P(z != 0) = 1/2 for alpha = 0 when left = -right: counted, and as the penalty's slope P (1 - P)."""
    draws = torch.rand(200_000, dtype=torch.float64)
    z = Gates().gate(torch.zeros_like(draws), draws)[1]
    assert (z > 0).double().mean().item() == pytest.approx(0.5, abs=0.005)
    skew = Gates(left=-0.5, right=2.0)
    chance = 1 / (1 + math.exp(-(0.3 - math.log(0.5 / 2.0))))
    z = skew.gate(torch.full_like(draws, 0.3), draws)[1]
    assert (z > 0).double().mean().item() == pytest.approx(chance, abs=0.005)


def here(base, *latents, seed=0):
    return Here(base, latents, Stream(seed), total=base.numel())


reals = some.floats(-3, 3).filter(lambda x: x == 0 or abs(x) > 1e-6)
entries = some.lists(some.tuples(reals, reals, some.floats(-4, 4), reals), min_size=1, max_size=12)


@given(entries, some.floats(-4, 4), some.booleans(), some.sampled_from(["product", "sum"]), some.floats(0, 2))
def test_gates_have_the_gradients_of_autograd(rows, group, structured, kind, penalty):
    """theta = theta_0 + z w and the penalty written out as a loss; its gradients by autograd, in float64."""
    base, w, alpha, g = torch.tensor(rows, dtype=torch.float64).T.contiguous()
    gates = Gates(penalty=penalty, structured=structured, group_penalty=kind, left=-0.7, right=1.6)
    latents = [w.clone(), alpha.clone(), torch.tensor(group, dtype=torch.float64)][: 3 if structured else 2]
    at = here(base, *latents)

    draws = Stream(0)
    u_group = uniform(torch.zeros((), dtype=torch.float64), draws) if structured else None
    u = uniform(alpha, draws)
    leaves = [latent.clone().requires_grad_() for latent in latents]

    def gate(a, noise):
        s = torch.sigmoid(torch.log(noise) - torch.log(1 - noise) + a)
        return (s * (1.6 + 0.7) - 0.7).clamp(0, 1)

    def open_chance(a):
        return torch.sigmoid(a - math.log(0.7 / 1.6))

    z = gate(leaves[1], u)
    open_gates = open_chance(leaves[1]).sum()
    if structured:
        z = z * gate(leaves[2], u_group)
        whole = open_chance(leaves[2])
        open_gates = open_gates * whole if kind == "product" else open_gates + whole
    theta = base + z * leaves[0]
    assert torch.allclose(gates.weight(here(base, *latents)), theta, rtol=0, atol=1e-14)
    expected = torch.autograd.grad((g * theta).sum(), leaves, retain_graph=True)
    pulled = gates.pull(g, at)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(pulled, expected, strict=True))
    expected = torch.autograd.grad((g * theta).sum() + penalty * open_gates, leaves)
    stepped = gates.step(pulled, here(base, *latents))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(stepped, expected, strict=True))


def test_a_difference_of_0_gives_its_gates_no_gradient():
    base = torch.ones(3)
    gates = Gates(penalty=0.0)
    pulled = gates.pull(torch.ones(3), here(base, *gates.start(base)))
    assert [p.abs().sum().item() for p in pulled[1:]] == [0.0, 0.0]
    assert pulled[0].abs().sum() > 0


def test_the_change_of_gates_has_no_noise():
    gates = Gates(structured=True)
    latents = (torch.tensor([2.0, 2.0, 2.0]), torch.tensor([5.0, 0.0, 0.5]), torch.tensor(0.4))
    z = torch.tensor([1.0, 0.0, 3 / (1 + math.exp(-0.5)) - 1.5]) * (3 / (1 + math.exp(-0.4)) - 1.5)
    for seed in (0, 1):
        assert torch.allclose(gates.change(here(torch.ones(3), *latents, seed=seed)), 2 * z)


# -- methods 2.11 F: masked gradients


def test_a_masked_gradient_is_0_or_the_gradient_over_p(monkeypatch):
    """p = .25, g = [4, 4, 4, 4], mask [1, 0, 0, 1] -> [16, 0, 0, 16]."""
    monkeypatch.setattr("selectune.phases.uniform", lambda like, stream: torch.tensor([0.1, 0.25, 0.9, 0.2]))
    base = torch.zeros(4)
    (masked,) = Weights(p=0.25).step((torch.full((4,), 4.0),), here(base, base))
    assert masked.tolist() == [16.0, 0.0, 0.0, 16.0]


@pytest.mark.parametrize("p", [0.2, 0.3, 0.4])
def test_the_mean_of_masked_gradients_is_the_gradient(p):
    g = torch.tensor([4.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    count, total, kept = 20_000, torch.zeros(4, dtype=torch.float64), 0
    for seed in range(count):
        (masked,) = Weights(p=p).step((g,), here(g, g, seed=seed))
        total += masked
        kept += int((masked != 0).sum())
    sigma = g.abs() * math.sqrt((1 - p) / p / count)
    assert bool(((total / count - g).abs() <= 5 * sigma).all())
    assert kept / (3 * count) == pytest.approx(p, abs=0.01)


def test_nan_under_the_mask_stays_out():
    g = torch.full((1000,), float("nan"))
    (masked,) = Weights(p=0.5).step((g,), here(g, g))
    assert 400 < int((masked == 0).sum()) < 600


@given(entries)
def test_l1_is_a_penalty_on_the_mean_change(rows):
    base, theta, _, g = torch.tensor(rows, dtype=torch.float64).T.contiguous()
    leaf = theta.clone().requires_grad_()
    ((g * leaf).sum() + 0.3 * (leaf - base).abs().sum() / len(rows)).backward()
    (found,) = Weights(l1=0.3).step((g,), here(base, theta))
    assert torch.allclose(found, leaf.grad, atol=1e-14)


# -- rounds


@given(some.integers(1, 5), some.integers(2, 40), some.integers(1, 50), some.floats(0.01, 0.99) | some.integers(1, 4))
def test_rounds_are_dense_then_sparse_and_come_to_the_budget(rounds, length, budget, share):
    steps = rounds * length + (length % rounds)
    if isinstance(share, int) and share >= length:
        with pytest.raises(ScheduleError, match="one is sparse"):
            Rounds(budget, steps, share, rounds)
        return
    schedule = Rounds(budget, steps, share, rounds)
    dense = [schedule.dense(t) for t in range(steps)]
    starts = [t for t in range(steps) if dense[t] and (t == 0 or not dense[t - 1])]
    turns = [t for t in range(1, steps + 5) if schedule.due(t)]
    assert starts == [r * steps // rounds for r in range(rounds)]
    assert turns == [t for t in range(1, steps) if not dense[t] and dense[t - 1]]
    assert [schedule.target(t) for t in turns] == [(r + 1) * budget // rounds for r in range(rounds)]
    assert all(schedule.target(t) <= schedule.target(t + 1) for t in range(steps))
    assert not schedule.dense(steps + 7)
    assert schedule.target(steps + 7) == budget
    if isinstance(share, int):
        assert sum(dense) == share * rounds


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": None}, ScheduleError, "optimizer steps of the run"),
        ({"steps": 1}, ScheduleError, "leaves a round 1 steps; dense=0.5 needs at least 2"),
        ({"share": 1.0}, ScheduleError, "a share below 1"),
        ({"share": 0}, ScheduleError, "a share below 1"),
        ({"share": float("nan")}, ScheduleError, "a share below 1"),
        ({"share": True}, ScheduleError, "a share below 1"),
        ({"rounds": 0}, ScheduleError, "rounds= is how often"),
        ({"rounds": 6}, ScheduleError, "a round 1 steps"),
        ({"budget": 0}, BudgetError, "at least 1"),
    ],
)
def test_rounds_that_cannot_be(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(Rounds(10, 10), **change)


# -- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.child_tuning_f(p=0.0), "p=0.0: the probability"),
        (lambda: st.child_tuning_f(p=1.5), "p=1.5"),
        (lambda: st.lt_sft(10, 10, l1=-1.0), "l1=-1.0"),
        (lambda: st.lt_sft(10, 10, dense_lr=0.0), "lr=0.0: a learning rate above 0"),
        (lambda: st.diff_pruning(10, 10, penalty=math.nan), "penalty=nan"),
        (lambda: st.diff_pruning(10, 10, start_from="zero"), "Unknown start_from 'zero'. Known: base, found"),
        (lambda: st.diff_pruning(10, 10, group_penalty="max"), "Unknown group_penalty"),
        (lambda: st.diff_pruning(10, 10, structured=1), "structured=1: True or False"),
        (lambda: Gates(left=0.0), "left below 0 and right above 1"),
        (lambda: st.Method(dense="all"), "must follow selectune.phases.DensePhase, got str"),  # pyright: ignore
        (lambda: st.Method(score=st.scores.change(), schedule=Rounds(5, 5)), "Three things come together"),
        (lambda: st.Method(score=st.scores.change(), schedule=OneShot(5), dense=Weights()), "Three things"),
        (lambda: st.Method(score=st.scores.d3(), schedule=Rounds(5, 5), dense=Weights()), "reads gradient"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_method_describes_its_dense_phase():
    assert st.lt_sft(0.1, 26).describe()["dense"] == {"name": "Weights", "l1": 0.0, "p": 1.0, "lr": None}
    assert "dense" not in st.pafi(5).describe()
