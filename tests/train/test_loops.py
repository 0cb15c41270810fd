"""The engine in the loops people write: accumulation, scalers, closures, checkpointing, autocast, odd orders."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train_kit import Blocks, Mixed, bits, changed, mixed_loss, same, steps, tokens

import selectune as st


def supports(tuner):
    return {name: flat.tolist() for name, flat in tuner.support.items()}


def trained(chunks: int = 1, steps_count: int = 6, **attach):
    """Supports after every step, and the model, of a float64 run over `chunks` backward passes a step."""
    torch.manual_seed(0)
    model = Mixed(torch.float64)
    tuner = st.attach(model, st.id3(60, steps_count), **attach)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    seen = []
    for i in range(steps_count):
        optimizer.zero_grad()
        for part in tokens(i, n=8).chunk(chunks):
            (mixed_loss(model, part) / chunks).backward()
        optimizer.step()
        seen.append(supports(tuner))
    return seen, model, tuner


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_selection_is_exact_over_the_accumulated_gradient(chunks):
    whole, model, _ = trained()
    parts, other, tuner = trained(chunks, accumulation_steps=chunks)
    assert parts == whole
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not tuner.events


def test_a_window_that_ends_short_is_closed_by_the_step():
    whole, _, _ = trained()
    parts, _, tuner = trained(2, accumulation_steps=4)
    assert parts == whole
    assert tuner.events["short_windows"] == 6


def test_clipping_reaches_the_entries_of_a_short_window():
    """A factor that scales the gradient of old entries between backward and step also scales that of new ones."""

    def run(k):
        torch.manual_seed(0)
        model = Mixed(torch.float64)
        tuner = st.attach(model, st.id3(60, 6), accumulation_steps=k)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.0)
        for i in range(2):
            optimizer.zero_grad()
            mixed_loss(model, tokens(i)).backward()
            tuner.parameters()[0].grad.mul_(0.5)
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 1.0  # the first step has no old entry that could show the factor
        return supports(tuner), list(model.parameters())

    (first, exact), (second, short) = run(1), run(3)
    assert first == second
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(exact, short, strict=True))


def test_too_many_backward_passes_say_so():
    model = Mixed()
    st.attach(model, st.id3(60, 6))
    mixed_loss(model, tokens(0)).backward()
    with pytest.raises(st.errors.AccumulationError, match="accumulation_steps = the number of backward passes"):
        mixed_loss(model, tokens(1)).backward()


def test_too_many_backward_passes_are_fine_for_a_fixed_support():
    model = Mixed(torch.float64)
    tuner = st.attach(model, st.random(60))
    (mixed_loss(model, tokens(0)) + mixed_loss(model, tokens(1))).backward()
    together = tuner.parameters()[0].grad.clone()
    tuner.parameters()[0].grad = None
    mixed_loss(model, tokens(0)).backward()
    mixed_loss(model, tokens(1)).backward()
    assert torch.allclose(tuner.parameters()[0].grad, together, atol=1e-14)


def test_two_forwards_in_one_backward_are_one_gradient():
    torch.manual_seed(0)
    model = Mixed(torch.float64)
    tuner = st.attach(model, st.id3(60, 6))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    seen = []
    for i in range(6):
        optimizer.zero_grad()
        a, b = tokens(i, n=8).chunk(2)
        ((mixed_loss(model, a) + mixed_loss(model, b)) / 2).backward()
        optimizer.step()
        seen.append(supports(tuner))
    assert seen == trained()[0]


@pytest.mark.parametrize("zero_late", [False, True])
def test_a_step_that_the_scaler_skips_leaves_no_trace(zero_late):
    """Steps 2 and 3 overflow: the run equals one that never saw their batches."""

    def run(batches):
        torch.manual_seed(0)
        model = Mixed(torch.float64)
        tuner = st.attach(model, st.id3(60, 6))
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10_000)
        for i in batches:
            if not zero_late:
                optimizer.zero_grad()
            loss = mixed_loss(model, tokens(abs(i)))
            if zero_late:
                optimizer.zero_grad()
            scaler.scale(loss).backward()
            if i < 0:  # an overflow that shows only in a value already trained, not in the scores
                tuner.parameters()[0].grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update(4.0)
        return tuner, bits(model)

    tuner, after = run([0, 1, -2, -3, 4, 5])
    clean, expected = run([0, 1, 4, 5])
    assert same(after, expected)
    assert supports(tuner) == supports(clean)
    assert (tuner.step, tuner.quota, tuner.events["skipped_steps"]) == (4, clean.quota, 2)


def test_non_finite_scores_select_nothing_and_carry_the_quota(caplog):
    model = nn.Linear(4, 3)
    tuner = st.attach(model, st.id3(6, 3))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    x = torch.randn(5, 4)
    for i, scale in enumerate((1.0, float("nan"), 1.0)):
        (model(x) * (scale if i == 1 else 1.0)).square().mean().backward()
        if i == 1:
            tuner.parameters()[0].grad.zero_()  # the user repairs the values' gradient and goes on
        optimizer.step()
        optimizer.zero_grad()
        assert tuner.selected == (2, 2, 6)[i]
    assert tuner.events["nonfinite_selections"] == 1
    assert 'scores of "bias", "weight" are not finite' in caplog.text or 'scores of "weight"' in caplog.text
    tuner.verify()


def test_entries_without_gradient_are_not_chosen_and_their_quota_is_carried():
    model = nn.Linear(6, 1, bias=False)
    tuner = st.attach(model, st.static_d3(4))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for seen in ((0, 1), (0, 2, 3)):
        x = torch.zeros(1, 6)
        x[0, list(seen)] = 1.0
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.support["weight"].tolist() == [0, 1, 2, 3]
    assert tuner.events["shortfall"] == 2


@pytest.mark.parametrize("name", ["AdamW", "SGD", "LBFGS"])
def test_a_closure_trains_selected_entries_only(name):
    model = Mixed(torch.float64)
    before = bits(model)
    tuner = st.attach(model, st.id3(60, 3))
    kind = getattr(torch.optim, name)
    optimizer = kind(tuner.parameters(), lr=0.1, **({"max_iter": 4} if name == "LBFGS" else {}))
    losses = []
    for i in range(5):

        def closure(i=i):
            optimizer.zero_grad()
            loss = mixed_loss(model, tokens(0))
            loss.backward()
            return loss

        losses.append(torch.as_tensor(optimizer.step(closure)).item())
        assert tuner.selected == min(60, 20 * (i + 1))
    assert losses[-1] < losses[0]
    support = {n: set(f.tolist()) for n, f in tuner.support.items()}
    assert all(where <= support[n] for n, where in changed(before, bits(model)).items())


@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize(
    "method", [st.id3(40, 6), st.random(40), st.id3(40, 6, every=2)], ids=["id3", "random", "every"]
)
def test_gradient_checkpointing_changes_nothing(mode, method):
    def run(mode):
        torch.manual_seed(0)
        model = Blocks(mode).double()
        tuner = st.attach(model, method)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        seen = []
        for i in range(8):
            torch.manual_seed(i)  # dropout
            model(torch.randn(5, 6, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(supports(tuner))
        return seen, list(model.parameters())

    (seen, weights), (expected, others) = run(mode), run("none")
    assert seen == expected
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_half_precision(dtype, autocast):
    model = Mixed(dtype)
    before = bits(model)
    tuner = st.attach(model, st.id3(60, 6))
    assert tuner.parameters()[0].dtype is torch.float32  # master values
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for i in range(6):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = mixed_loss(model, tokens(i))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.verify().selected == 60
    tuner.detach()
    assert same(bits(model), before)


def test_small_updates_of_bfloat16_weights_add_up():
    """Each of 50 updates is below half an ulp of the weight; the float32 master keeps their sum."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    tuner = st.attach(model, st.random(1))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=1e-3)
    for _ in range(50):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(model.weight.item() - 0.95) < 0.005


def test_float64_and_float32_weights_in_one_model():
    model = nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 4))
    model[1].register_forward_pre_hook(lambda m, args: (args[0].float(),))
    tuner = st.attach(model, st.id3(12, 3))
    assert tuner.parameters()[0].dtype is torch.float64
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for _ in range(3):
        model(torch.randn(5, 4, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.verify().changed == 12


def test_sampled_gradients_are_the_dense_ones():
    """Every kind of parameter at once: the values' gradient is autograd's own at the support."""
    torch.manual_seed(0)
    model = Mixed(torch.float64)
    mixed_loss(model, tokens(0)).backward()
    dense = {n: None if p.grad is None else p.grad.flatten() for n, p in model.named_parameters()}
    model.zero_grad()
    tuner = st.attach(model, st.random(0.5), seed=1)
    mixed_loss(model, tokens(0)).backward()
    (values,) = tuner.parameters()
    checked = 0
    for tensor, page in zip(tuner.engine.now.tensors, tuner.engine.ledger.pages, strict=True):
        expected = dense[tensor.name]
        got = values.grad[page.slot]
        assert torch.allclose(got, torch.zeros_like(got) if expected is None else expected[page.flat], atol=1e-14), (
            tensor.name
        )
        checked += page.flat.numel()
    assert checked == tuner.selected > 300
    assert set(tuner.unreached) == {"unused.weight", "unused.bias"}


def test_sparse_embedding_gradients_are_the_dense_ones():
    def run(sparse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 4, sparse=sparse), nn.Linear(4, 3)).double()
        tuner = st.attach(model, st.id3(12, 3))
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        for i in range(4):
            model(tokens(i)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return supports(tuner), bits(model)

    (support, weights), (expected, others) = run(True), run(False)
    assert support == expected
    assert same(weights, others)


def test_evaluation_between_steps_sees_the_trained_weights_and_changes_nothing():
    model = Mixed()
    tuner = st.attach(model, st.id3(60, 6))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    last = None
    for _ in steps(model, optimizer, 6):
        with torch.no_grad():
            now = mixed_loss(model, tokens(0)).item()
        assert now != last
        last = now
        mixed_loss(model, tokens(1))  # with gradients on, never run backward
    assert (tuner.selected, tuner.step, dict(tuner.events)) == (60, 6, {})


def test_training_goes_on_when_only_the_model_is_kept():
    model = Mixed()
    optimizer = torch.optim.AdamW(st.attach(model, st.id3(60, 6)).parameters(), lr=1e-2)
    before = bits(model)
    for _ in steps(model, optimizer, 6):
        pass
    assert sum(map(len, changed(before, bits(model)).values())) == 60


def test_an_optimizer_without_torch_hooks_is_followed():
    """Some optimizers write through .data and never call torch.optim.Optimizer.step."""
    model = Mixed()
    before = bits(model)
    tuner = st.attach(model, st.id3(60, 6))
    (values,) = tuner.parameters()
    for i in range(7):
        values.grad = None
        mixed_loss(model, tokens(i)).backward()
        values.data -= 0.1 * values.grad
    mixed_loss(model, tokens(0))
    assert (tuner.step, tuner.selected) == (7, 60)
    assert sum(map(len, changed(before, bits(model)).values())) == 60


def test_input_gradients_alone_do_not_count_as_a_backward_pass():
    model = Blocks().double()
    tuner = st.attach(model, st.id3(40, 4))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for _ in range(4):
        x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        torch.autograd.grad(model(x).sum(), x)
        model(x.detach()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (tuner.selected, tuner.step) == (40, 4)


def test_a_backward_pass_that_breaks_off_is_forgotten():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("out of memory, say")

    torch.manual_seed(0)
    model = Blocks().double()
    tuner = st.attach(model, st.id3(40, 4))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    x = torch.randn(5, 6, dtype=torch.float64)
    handle = model.blocks[0].register_forward_hook(lambda m, args, out: Broken.apply(out))
    with pytest.raises(RuntimeError, match="out of memory"):
        model(x).square().mean().backward()
    handle.remove()
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert (tuner.selected, tuner.step, dict(tuner.events)) == (40, 4, {})


def test_dropped_entries_of_repeat_lose_their_optimizer_state():
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    tuner = st.attach(model, st.repeat_d3(1, 2))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=1.0, momentum=0.9)
    for g in ([3.0, 2.0, 1.0], [1.0, 2.0, 1.5]):
        model(torch.tensor([g])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    # methods: theta = [-3, -2, 0]; with the first entry's momentum in the slot it would be -4.7
    assert model.weight.flatten().tolist() == [-3.0, -2.0, 0.0]
    assert (tuner.support["weight"].tolist(), tuner.touched, tuner.selected) == ([1], 2, 1)
    assert tuner.delta().support["weight"].tolist() == [0, 1]
