"""Calibrated scores against plain torch, and that the model comes back as it was, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import nn
from train_kit import Mixed, bits, mixed_loss, same, tokens

import selectune as st
from selectune.errors import CalibrationError
from selectune.train.choose.calibrate import calibrate
from selectune.train.choose.still import absolute, drawn

BATCHES = [torch.randn(4, 5, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(3)]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).double()


def loss(model, x, temperature=1.0):
    return nn.functional.cross_entropy(model(x) / temperature, x[:, :3].argmax(1))


def found(model, score, batches=BATCHES, f=loss):
    tensors = st.Scope().find(model).tensors
    return calibrate(model, score, tensors, batches, f)


def gradients(model, batch, f=loss, **graph):
    return torch.autograd.grad(f(model, batch), list(model.parameters()), **graph)


def test_batches_are_scored_one_by_one():
    model = net().eval()
    ours = found(model, st.scores.movement(batches=None))
    slow = [torch.zeros_like(p) for p in model.parameters()]
    for batch in BATCHES:
        for total, w, g in zip(slow, model.parameters(), gradients(model, batch), strict=True):
            total += -(g * w)
    assert all(torch.equal(a, b) for a, b in zip(ours, slow, strict=True))


def test_pooled_gradients_are_summed_before_the_score():
    model = net().eval()
    ours, sizes = found(model, st.scores.snip(batches=2)), found(model, st.scores.d3_pooled(exp=0.0, batches=2))
    slow = [torch.zeros_like(p) for p in model.parameters()]
    for batch in BATCHES[:2]:
        for total, g in zip(slow, gradients(model, batch), strict=True):
            total += g
    assert all(torch.equal(a, (g * w).abs()) for a, g, w in zip(ours, slow, model.parameters(), strict=True))
    assert all(torch.equal(a, g.abs()) for a, g in zip(sizes, slow, strict=True))


def test_clipping_is_per_tensor_and_before_the_square():
    def steep(model, x):
        return 50 * loss(model, x)

    model = net().eval()
    ours = found(model, st.scores.fisher_batches(train_mode=False), f=steep)
    slow = [torch.zeros_like(p) for p in model.parameters()]
    for batch in BATCHES:
        for total, g in zip(slow, gradients(model, batch, steep), strict=True):
            assert g.norm() > 1
            total += (g / (g.norm() + 1e-6)) ** 2
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, slow, strict=True))


def test_clipping_scales_down_only():
    model = net().eval()
    short = lambda m, x: loss(m, x) / 100  # noqa: E731
    assert all(g.norm() < 1 for batch in BATCHES for g in gradients(model, batch, short))
    clipped, plain = (found(model, st.scores.fisher_batches(clip=c, train_mode=False), f=short) for c in (1.0, None))
    assert all(torch.equal(a, b) for a, b in zip(clipped, plain, strict=True))


def test_train_mode_is_a_word_of_the_score():
    seen = []

    def watching(model, x):
        seen.append(model.training)
        return loss(model, x)

    for model in (net().eval(), net().train()):
        mode = model.training
        found(model, st.scores.fisher_batches(), f=watching)
        found(model, st.scores.movement(batches=3), f=watching)
        assert seen == [True] * 3 + [False] * 3
        assert model.training is model[2].training is mode
        seen.clear()


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_curvature_is_the_hessian_times_the_gradient(temperature):
    model = net().eval()
    ours = found(model, st.scores.grasp(batches=None, temperature=temperature))
    sizes = [p.shape for p in model.parameters()]

    def whole(flat):
        parts = flat.split([size.numel() for size in sizes])
        w, b, v, c = (part.view(size) for part, size in zip(parts, sizes, strict=True))
        return sum(loss(lambda x: (x @ w.T + b).tanh() @ v.T + c, batch, temperature) for batch in BATCHES)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    (g,) = torch.autograd.grad(whole(flat), flat)
    slow = (flat * (torch.autograd.functional.hessian(whole, flat) @ g)).detach()
    assert torch.allclose(torch.cat([s.flatten() for s in ours]), slow, rtol=1e-9, atol=1e-18)
    assert slow.abs().max() > 1e-9


def test_curvature_through_attention_norm_convolution_and_recurrence():
    torch.manual_seed(0)
    model = Mixed(torch.float64)
    scores = found(model, st.scores.grasp(batches=1, temperature=1.0), [tokens(0)], mixed_loss)
    assert sum(bool(s.any()) for s in scores) > 10


def test_flow_is_that_of_absolute_weights():
    model = net().eval()
    base = bits(model)
    ones = torch.ones(1, 5, dtype=torch.float64)
    ours = found(model, st.scores.synflow(), [ones], lambda m, x: m(x).sum())
    assert same(bits(model), base)
    twin = net().eval()
    with torch.no_grad():
        for p in twin.parameters():
            p.abs_()
    slow = [
        (g * w).abs() for g, w in zip(gradients(twin, ones, lambda m, x: m(x).sum()), twin.parameters(), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(ours, slow, strict=True))


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@given(some.integers(0, 2**31), some.sampled_from(DTYPES), some.booleans())
def test_absolute_weights_come_back_bit_for_bit(seed, dtype, fails):
    random = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (6, 5 * dtype.itemsize), dtype=torch.uint8, generator=random).view(dtype)
    data[0, :2] = torch.tensor([-0.0, float("nan")])
    model = nn.ParameterList([nn.Parameter(data), nn.Parameter(data.clone().t())])  # NaN payloads; strided
    before = bits(model)
    try:
        with absolute(model):
            assert all(not bool(torch.signbit(p.detach()).any()) for p in model)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert same(bits(model), before)


@pytest.mark.parametrize("score", [st.scores.snip(), st.scores.synflow(), st.scores.grasp(temperature=1.0)], ids=str)
def test_a_loss_that_raises_leaves_the_model_as_it_was(score):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).bfloat16().train()
    model[0].bias.requires_grad_(False)
    base = bits(model)

    def broken(m, x):
        m.train()
        m(x)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        found(model, score, [torch.randn(3, 5).bfloat16()], broken)
    assert same(bits(model), base)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_matrices_of_zeros_are_scored_as_if_drawn():
    """An up-projection starts at 0: its scores would be 0, and so would be those of all that feeds it."""
    model = net().eval()
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].bias.zero_()
    base = bits(model)
    with pytest.raises(CalibrationError, match="or every score is 0"):
        found(model, st.scores.snip())
    score = st.scores.snip()
    ours = found(model, st.Score(score.name, score.reads, score.function, score.parameters, drawn=0.02))
    assert same(bits(model), base)
    assert all(bool(s.all()) for s in ours[:3])
    assert not bool(ours[3].any())  # a bias of 0 stays 0
    tensors = st.Scope().find(model).tensors
    with drawn(tensors, 0.02, 1):
        first = model[3].weight.detach().clone()
    with drawn(tensors, 0.02, 1):
        assert torch.equal(model[3].weight, first)
    with drawn(tensors, 0.02, 2):
        assert not torch.equal(model[3].weight, first)


def test_calibration_may_be_a_callable():
    lists, calls = (found(net(), st.scores.movement(batches=3), b) for b in (BATCHES, lambda: iter(BATCHES)))
    assert all(torch.equal(a, b) for a, b in zip(lists, calls, strict=True))


def test_only_the_hardest_examples_count():
    model = net().eval()
    losses = [loss(model, b).item() for b in BATCHES]
    at = max(range(3), key=losses.__getitem__)
    ours = found(model, st.scores.fisher(examples=None, hardest=1))
    slow = [g.square() for g in gradients(model, BATCHES[at])]
    assert all(torch.equal(a, b) for a, b in zip(ours, slow, strict=True))


def test_only_the_hardest_examples_are_differentiated():
    """What it costs: a forward pass without a graph for all, forward and backward for the hardest."""
    with_a_graph = []

    def watching(model, x):
        with_a_graph.append(torch.is_grad_enabled())
        return loss(model, x)

    found(net(), st.scores.fisher(examples=None, hardest=2), f=watching)
    assert with_a_graph == [False] * 3 + [True] * 2


def hard(seed):
    return torch.randn(1, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_scores_are_read_again_at_the_weights_of_the_step():
    """FISH-DIP against a plain loop: losses of all, Fisher of the 2 hardest, the 7 best, a step of SGD on these."""
    examples, x = [hard(s) for s in range(6)], hard(9)
    model, twin = net().eval(), net().eval()
    tuner = st.attach(model, st.fish_dip(7, 5, examples=2, every=2), calibration=lambda: iter(examples), loss=loss)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.5)
    weights = list(twin.parameters())
    masks = []
    for step in range(6):
        loss(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 2, 4):
            order = sorted(range(6), key=lambda i: -loss(twin, examples[i]).item())[:2]
            fisher = sum(torch.cat([g.flatten() for g in gradients(twin, examples[i])]).square() for i in sorted(order))
            masks.append(torch.zeros_like(fisher).scatter(0, fisher.argsort(descending=True, stable=True)[:7], 1.0))
        g = torch.cat([g.flatten() for g in gradients(twin, x)]) * masks[-1]
        with torch.no_grad():
            for w, part in zip(weights, g.split([w.numel() for w in weights]), strict=True):
                w -= 0.5 * part.view(w.shape)
        here = [p for n, p in model.named_parameters() if "selectune_values" not in n]
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(here, weights, strict=True))
    assert not torch.equal(masks[0], masks[1])  # the mask changed
    assert tuner.touched == int((sum(masks) > 0).sum()) > 7


def test_scoring_in_mid_run_leaves_gradients_modes_and_chance_alone():
    torch.manual_seed(0)
    model = Mixed().train()
    method = st.fish_dip(60, 6, examples=2, every=2, train_fully="norm.*")
    examples = [tokens(s, n=1) for s in range(4)]
    tuner = st.attach(model, method, calibration=examples, loss=mixed_loss, accumulation_steps=2)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for step in range(4):
        state = torch.get_rng_state()
        mixed_loss(model, tokens(step)).backward()
        assert torch.equal(torch.get_rng_state(), state)
        first = model.norm.weight.grad.clone()
        mixed_loss(model, tokens(step)).backward()
        assert torch.allclose(model.norm.weight.grad, 2 * first)  # nothing of the scoring is in it
        assert all(m.training for m in model.modules())
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.verify().selected == 60


def test_a_buffer_with_the_widest_entries_comes_back():
    """float64 pairs: 16 bytes an entry, more than any integer of torch has."""
    model = net()
    model.register_buffer("phase", torch.full((3,), -0.0 + 1j, dtype=torch.complex128))
    found(model, st.scores.snip(batches=1), f=lambda model, x: model.phase.mul_(2).abs().sum() * loss(model, x))
    assert torch.equal(torch.view_as_real(model.phase), torch.tensor([[0.0, 1.0]] * 3, dtype=torch.float64))


def test_data_for_scores_that_are_read_again():
    def attach(batches, **options):
        return st.attach(net(), st.fish_dip(5, 4, **options), calibration=batches, loss=loss)

    with pytest.raises(CalibrationError, match="calibration= is a list_iterator, which is used up after the first"):
        attach(iter(BATCHES), examples=1)
    with pytest.raises(CalibrationError, match="yielded 3 examples; the 4 hardest were asked for"):
        attach(BATCHES, examples=4)
    assert attach(BATCHES, examples=1).selected == 5
    assert st.attach(net(), st.fish(5, examples=3), calibration=iter(BATCHES), loss=loss).selected == 5  # once: enough


def test_entries_that_no_gradient_reached_are_counted(caplog):
    """methods 2.6: rows of a table that no example names score 0, and are chosen where the budget exceeds the rest."""
    model = nn.Embedding(10, 2)
    tuner = st.attach(model, st.fish(9, examples=2), calibration=[torch.tensor([3]), torch.tensor([5])],
                      loss=lambda m, x: m(x).square().sum())  # fmt: skip
    assert tuner.support["weight"].tolist() == [0, 1, 2, 3, 4, 6, 7, 10, 11]
    assert tuner.events["zero_scores"] == 5
    assert "5 of the 9 entries chosen score 0" in caplog.text
    caplog.clear()
    tuner.detach()
    tuner = st.attach(model, st.fish(4, examples=2), calibration=[torch.tensor([3]), torch.tensor([5])],
                      loss=lambda m, x: m(x).square().sum())  # fmt: skip
    assert tuner.support["weight"].tolist() == [6, 7, 10, 11]
    assert not tuner.events["zero_scores"]
    assert not caplog.text


def test_what_cannot_be_read_is_said():
    model = net()
    base = bits(model)

    def attach(method, batches=BATCHES, f=loss):
        return st.attach(model, method, calibration=batches, loss=f)

    with pytest.raises(CalibrationError, match="'snip' reads mini-batches: give attach"):
        st.attach(model, st.snip(5))
    with pytest.raises(CalibrationError, match=r"'synflow' reads the flow of an input of ones: .*sum of the outputs"):
        st.attach(model, st.synflow(5), calibration=BATCHES)
    with pytest.raises(CalibrationError, match="yielded 3 of the 4 batches asked for"):
        attach(st.snip(5, batches=4))
    with pytest.raises(CalibrationError, match="divides logits by its temperature 200, which only the loss callable"):
        attach(st.grasp(5), f=lambda m, x: loss(m, x))
    with pytest.raises(CalibrationError, match=r'NaN or infinite, first of "0\.weight"'):
        attach(st.snip(5), f=lambda m, x: loss(m, x) * float("inf"))
    with pytest.raises(CalibrationError, match="the sum of the outputs must be a scalar"):
        attach(st.synflow(5), f=lambda m, x: m(x))
    with pytest.raises(CalibrationError, match="or every score is 0"):
        attach(st.grasp(5, temperature=1.0), f=lambda m, x: m[0](x).sum())  # linear: no curvature
    with pytest.raises(CalibrationError, match="yielded no batch"):
        attach(st.movement(5, batches=None), batches=[])
    for bad in ({"batches": 0}, {"batches": True}, {"temperature": 0.0}):
        with pytest.raises(st.errors.ConfigError, match=next(iter(bad))):
            st.grasp(5, **bad)
    assert same(bits(model), base)
    assert all(p.requires_grad for p in model.parameters())
