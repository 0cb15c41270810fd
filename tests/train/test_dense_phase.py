"""A dense phase inside a run: its training is plain torch's, its rewind exact, and what it leaves behind O(B)."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn
from torch.func import functional_call
from train_kit import Mixed, bits, changed, same, steps

import selectune as st
from selectune.phases import Gates
from selectune.scope import OWN
from selectune.seeds import uniform

LR = 0.05


def adamw(tuner, **options):
    return torch.optim.AdamW(tuner.parameters(), lr=1e-2, **options)


def small(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def batch(seed, dtype=torch.float64):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss_of(model, seed, **weights):
    return (
        functional_call(model, weights, (batch(seed),)).square().mean() if weights else model(batch(seed)).pow(2).mean()
    )


def train(model, optimizer, count, start=0):
    for step in range(start, start + count):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


# -- against plain torch


def ranked(before, after, k, taken):
    """The k entries that moved most, ties by tensor and flat index, one by one in plain Python."""
    moved = [
        (-abs(float(b) - float(a)), t, i)
        for t, (old, new) in enumerate(zip(before, after, strict=True))
        for i, (a, b) in enumerate(zip(old.flatten(), new.flatten(), strict=True))
        if (t, i) not in taken
    ]
    return {(t, i) for _, t, i in sorted(moved)[:k]}


def lottery(model, budget, rounds, dense, sparse, make):
    """Train all, select by change, rewind, train those: dense gradients, a mask and fresh optimizers."""
    parameters, support, step = list(model.parameters()), set(), 0
    for r in range(rounds):
        before = [p.detach().clone() for p in parameters]
        optimizer = make(parameters)
        train(model, optimizer, dense, step)
        step += dense
        quota = (r + 1) * budget // rounds - len(support)
        support |= ranked(before, [p.detach() for p in parameters], quota, support)
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
        optimizer = make(parameters)
        for _ in range(sparse):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            for t, p in enumerate(parameters):
                mask = torch.zeros(p.numel(), dtype=torch.bool)
                mask[[i for tensor, i in support if tensor == t]] = True
                p.grad = torch.where(mask.view_as(p), p.grad, 0.0)
            optimizer.step()
            step += 1
    return support


@settings(max_examples=40)
@given(some.integers(1, 20), some.integers(1, 3), some.integers(1, 3), some.integers(1, 3), some.booleans())
def test_it_is_the_lottery_ticket_of_plain_torch(budget, rounds, dense, sparse, momentum):
    def make(parameters):
        if momentum:
            return torch.optim.SGD(parameters, lr=LR, momentum=0.9)
        return torch.optim.Adam(parameters, lr=LR)

    oracle, model = small(), small()
    expected = lottery(oracle, budget, rounds, dense, sparse, make)
    tuner = st.attach(model, st.lt_sft(budget, rounds * (dense + sparse), dense, rounds))
    train(model, make(tuner.parameters()), rounds * (dense + sparse))
    names = [n for n, _ in oracle.named_parameters()]
    assert {(names.index(n), i) for n, flat in tuner.support.items() for i in flat.tolist()} == expected
    assert tuner.selected == budget
    now = dict(model.named_parameters())
    assert all(torch.allclose(p, now[n], atol=1e-12, rtol=0) for n, p in oracle.named_parameters())
    assert tuner.verify().changed <= budget


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("start", ["base", "found"])
def test_it_is_the_diff_pruning_of_plain_torch(structured, start):
    """w and alpha as autograd leaves, the penalty in the loss, then the K largest |z w| alone."""
    kind = Gates(penalty=0.01, structured=structured, start_from=start, alpha=0.3)
    method = st.Method(
        score=st.scores.change(), schedule=st.schedule.Rounds(9, 7, 4), dense=kind, name="gated"
    )  # a start at alpha = 0.3 moves gates at once
    model, oracle = small(), small()
    tuner = st.attach(model, method, seed=3)
    optimizer = torch.optim.Adam([{"params": g["params"], "lr": g["lr"]} for g in tuner.parameter_groups(LR)])
    base = {n: p.detach().clone() for n, p in oracle.named_parameters()}
    w = {n: torch.zeros_like(p, requires_grad=True) for n, p in base.items()}
    alpha = {n: torch.full_like(p, 0.3, requires_grad=True) for n, p in base.items()}
    group = {n: torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for n in base}
    gates = [*alpha.values(), *(group.values() if structured else ())]
    plain = torch.optim.Adam([{"params": [*w.values()], "lr": LR}, {"params": gates, "lr": 0.1}])

    def gate(a, u):
        return (torch.sigmoid(torch.logit(u.clamp(1e-4, 0.9999)) + a) * 3 - 1.5).clamp(0, 1)

    def theta(noise):
        z = {n: gate(alpha[n], noise[n][1]) * (gate(group[n], noise[n][0]) if structured else 1) for n in base}
        return {n: base[n] + z[n] * w[n] for n in base}

    half = {n: (torch.tensor(0.5, dtype=torch.float64), torch.full_like(p, 0.5)) for n, p in base.items()}
    for step in range(4):
        noise = {}
        for i, (n, p) in enumerate(base.items()):
            draws = tuner.engine.phase._input(i).stream
            noise[n] = uniform(torch.zeros((), dtype=torch.float64), draws) if structured else None, uniform(p, draws)
        plain.zero_grad()
        chance = {n: torch.sigmoid(alpha[n]).sum() * (torch.sigmoid(group[n]) if structured else 1) for n in base}
        (loss_of(oracle, step, **theta(noise)) + 0.01 * sum(chance.values())).backward()
        plain.step()
        train(model, optimizer, 1, step)
    with torch.no_grad():
        found = theta(half)
    expected = ranked([base[n] for n in base], [found[n] for n in base], 9, set())
    names = list(base)
    assert {(names.index(n), i) for n, flat in tuner.support.items() for i in flat.tolist()} == expected
    origin = found if start == "found" else base
    now = dict(model.named_parameters())
    for n in base:
        kept = torch.zeros(base[n].numel(), dtype=torch.bool)
        kept[[i for t, i in expected if names[t] == n]] = True
        assert torch.allclose(now[n], torch.where(kept.view_as(base[n]), origin[n], base[n]), atol=1e-10, rtol=0)
    train(model, optimizer, 3, 4)
    assert tuner.verify().changed == 9
    assert not tuner.in_dense_phase


def test_the_lottery_ticket_of_four_weights():
    """methods 2.10: theta_0 = [1, 1, 1, 1], theta_1 = [1.1, .5, 1, 1.3], K = 2 -> {1, 3}, rewound to ones."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.ones_(model.weight)
    tuner = st.attach(model, st.lt_sft(2, 2))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=1.0)
    model(torch.tensor([[-0.1, 0.5, 0.0, -0.3]])).sum().backward()
    optimizer.step()
    assert tuner.support["weight"].tolist() == [1, 3]
    assert model.weight.tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert model.weight.grad is None
    optimizer.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert model.weight.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_two_rounds_choose_among_the_still_frozen():
    """methods 2.10: two iterations, K = 2: first {1}, then the best of the rest, from where the first ended."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.ones_(model.weight)
    tuner = st.attach(model, st.lt_sft(2, 4, rounds=2))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=1.0)
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.tensor([[-0.1, 0.5, 0.0, -0.3]])).sum().backward()
        optimizer.step()
        seen.append((tuner.support["weight"].tolist(), model.weight.flatten().tolist()))
    assert seen[0] == ([1], [1.0, 1.0, 1.0, 1.0])
    assert seen[1] == ([1], [1.0, 0.5, 1.0, 1.0])
    assert seen[2] == ([1, 3], [1.0, 0.5, 1.0, 1.0])  # entry 1 moved most again; it is the first round's
    assert seen[3][1] == pytest.approx([1.0, 0.0, 1.0, 1.3])


def test_projection_keeps_exactly_the_largest():
    """methods 2.9: differences [.3, -.5, .1, .5]: keep 2 -> {1, 3}; keep 1 -> {1}, the tie goes to the lower index."""
    for budget, expected in ((2, [1, 3]), (1, [1])):
        model = nn.Linear(4, 1, bias=False)
        tuner = st.attach(model, st.diff_pruning(budget, 2, structured=False))
        w, alpha = (p for p in tuner.parameters() if p.numel() == 4)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.0)
        with torch.no_grad():
            w.copy_(torch.tensor([[0.3, -0.5, 0.1, 0.5]]))
        assert bool((alpha == 5.0).all())  # open: z = 1
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert tuner.support["weight"].tolist() == expected


# -- rewind, proof, file and end, in each phase

METHODS = {
    "weights": lambda: st.lt_sft(60, 6),
    "rounds": lambda: st.lt_sft(61, 6, rounds=2, train_fully=["norm.*"]),
    "gates": lambda: st.diff_pruning(60, 6, gate_lr=0.05, train_fully=["norm.*"]),
    "found": lambda: st.diff_pruning(60, 6, structured=False, start_from="found"),
    "masked": lambda: st.child_tuning_f(0.5),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


@every_method
@every_dtype
def test_every_moment_verifies_saves_and_reverts(make, dtype, tmp_path):
    for moment in range(6):
        torch.manual_seed(0)
        model = Mixed(dtype)
        base = bits(model)
        grads = [p.requires_grad for p in model.parameters()]
        tuner = st.attach(model, make())
        for _ in steps(model, adamw(tuner, weight_decay=0.1), moment):
            pass
        whole = {t.name for t in tuner.engine.now.whole}
        moved = changed(base, bits(model))
        verified = tuner.verify()
        allowed = {n: set(f.tolist()) for n, f in tuner.support.items()}
        assert all(n in whole or where <= allowed[n] for n, where in moved.items())
        assert verified.dense == sum(base[n].numel() for n in whole)
        if tuner.in_dense_phase:
            assert tuner.trained == sum(f.numel() for f in base.values())
        now = bits(model)
        delta = st.load(tuner.save(tmp_path / f"{moment}.safetensors", allow_empty=True))
        tuner.detach()
        assert same(bits(model), base)
        assert [p.requires_grad for p in model.parameters()] == grads
        assert not [n for n, _ in model.named_parameters() if OWN in n]
        with delta.applied(model):
            assert same(bits(model), now)


@every_dtype
@pytest.mark.parametrize("name", ["weights", "gates"])
def test_the_switch_rewinds_to_the_bit_and_leaves_state_of_the_size_of_the_budget(name, dtype):
    torch.manual_seed(0)
    model = Mixed(dtype)
    base = bits(model)
    tuner = st.attach(model, st.lt_sft(60, 6) if name == "weights" else st.diff_pruning(60, 6, gate_lr=0.05))
    optimizer = adamw(tuner, weight_decay=0.1)
    latents = tuner.parameters()[1:]
    tensors = len(tuner.engine.now.whole)
    assert sum(p.numel() for p in latents) == (1580 if name == "weights" else 2 * 1580 + tensors)
    turn = 1 if name == "weights" else 3
    run_to(tuner, model, optimizer, turn - 1)
    assert bool(changed(base, bits(model))) is (turn > 1)
    run_to(tuner, model, optimizer, turn)
    assert same(bits(model), base)  # selected, not yet trained
    assert tuner.selected == 60
    run_to(tuner, model, optimizer, 5)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [p for p in held if p.grad is not None] == tuner.parameters()  # one gradient, of 60 values
    assert sum(t.numel() for state in optimizer.state.values() for t in state.values()) == 2 * 60 + 1
    assert sum(p.numel() for p in held if p not in set(model.parameters())) == 0  # latents' memory is given back
    assert [n for n, _ in model.named_parameters() if OWN in n] == ["unused.selectune_values"]
    assert not tuner.engine.base.whole
    assert 0 < sum(len(where) for where in changed(base, bits(model)).values()) <= 60


def run_to(tuner, model, optimizer, step):
    for _ in steps(model, optimizer, step - tuner.step, start=tuner.step):
        pass


def test_heads_are_rewound_with_the_rest():
    """In each round they are rewound to their values at its start, with a fresh optimizer state."""
    torch.manual_seed(0)
    model = Mixed()
    tuner = st.attach(model, METHODS["rounds"]())  # dense steps 0 and 3
    optimizer, head = adamw(tuner), model.norm.weight
    first = head.detach().clone()
    run_to(tuner, model, optimizer, 1)
    assert torch.equal(head, first)
    assert head not in optimizer.state
    run_to(tuner, model, optimizer, 3)
    assert tuner.in_dense_phase
    second = head.detach().clone()
    assert not torch.equal(second, first)
    run_to(tuner, model, optimizer, 4)
    assert not tuner.in_dense_phase
    assert torch.equal(head, second)


def test_heads_stay_where_found_values_do():
    torch.manual_seed(0)
    model = Mixed()
    before = model.norm.weight.detach().clone()
    tuner = st.attach(model, st.diff_pruning(60, 6, start_from="found", train_fully=["norm.*"]))
    run_to(tuner, model, adamw(tuner), 3)
    assert not tuner.in_dense_phase
    assert not torch.equal(model.norm.weight, before)


def test_the_warning_counts_the_bytes(caplog):
    model = nn.Linear(100, 10)
    st.attach(model, st.lt_sft(5, 10))
    assert "holds 16,160 bytes beside the model" in caplog.text  # 1,010 weights: base, gradient, two moments
    caplog.clear()
    st.attach(copy.deepcopy(nn.Linear(100, 10)), st.diff_pruning(5, 10, structured=False))
    assert f"holds {4 * 1010 + 4 * 4 * 2020:,} bytes" in caplog.text
