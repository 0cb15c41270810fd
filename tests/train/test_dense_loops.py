"""Dense phases under the loops that people write: accumulation, scalers, clipping, closures, resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from train_kit import Blocks, Mixed, bits, mixed_loss, same, steps, tokens

import selectune as st
from selectune.schedule import Rounds

GATES = {"alpha": 0.2, "structured": True}


def gated(budget=30, count=8, share=4, **options):
    """Gates that start half open, so that a few steps move them."""
    kind = st.phases.Gates(**{**GATES, **options})
    return st.Method(score=st.scores.change(), schedule=Rounds(budget, count, share), dense=kind, name="gated")


METHODS = {
    "weights": lambda: st.lt_sft(30, 8, dense=4, l1=0.01),
    "gates": gated,
    "masked": lambda: st.child_tuning_f(0.5),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def attached(make, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Mixed(dtype)
    return model, st.attach(model, make(), **options)


def whole(tuner):
    """Bits of all that is trained."""
    return [p.detach().clone().flatten().view(torch.uint8) for p in tuner.parameters()]


# -- one step, several backward passes


def test_a_step_has_one_draw_whatever_its_passes():
    """Gradients of two half batches add up to that of the whole one, gate by gate."""
    found = []
    for chunks in (1, 2):
        model, tuner = attached(gated, torch.float64, accumulation_steps=chunks)
        for _ in steps(model, torch.optim.SGD(tuner.parameters(), lr=0.1), 2):  # w leaves 0, gates get gradients
            pass
        tuner.engine.tracker.accumulation_steps = chunks
        model.zero_grad()
        weights = bits(model)
        for part in tokens(9, n=4).chunk(chunks):
            (mixed_loss(model, part) / chunks).backward()
            assert same(bits(model), weights)
        found.append([p.grad for p in tuner.parameters() if p.grad is not None])
        torch.optim.SGD(tuner.parameters(), lr=0.0).step()
        assert not same(bits(model), weights)  # the next step's draw
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(*found, strict=True))


@every_method
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_a_scaler_skips_never_was(make, fused):
    """A fused optimizer unscales and skips inside its step, after the hook: penalties must not be scaled down."""

    def train(broken):
        model, tuner = attached(make, torch.float64)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0 if broken else 4.0, growth_interval=1000)
        step = 0
        for i in range(7 if broken else 6):
            optimizer.zero_grad()
            skipped = broken and i == 2
            before = whole(tuner)
            loss = mixed_loss(model, tokens(step)) * (float("inf") if skipped else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if skipped:
                assert all(torch.equal(a, b) for a, b in zip(before, whole(tuner), strict=True))
                assert tuner.step == 2
            step += not skipped
        return model, tuner

    (model, tuner), (other, skipping) = train(False), train(True)
    assert tuner.step == skipping.step == 6
    assert {n: f.tolist() for n, f in tuner.support.items()} == {n: f.tolist() for n, f in skipping.support.items()}
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_penalties_come_after_unscaling_and_clipping():
    """Loss 30 w_0 scaled by 1024 and clipped to norm 1; then the gradient of 4 * mean |w| is added, as it is."""
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    tuner = st.attach(model, st.lt_sft(1, 9, dense=8, l1=4.0))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(model(torch.tensor([[30.0, 0.0, 0.0, 0.0]], dtype=torch.float64)).sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(tuner.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        seen.append(model.weight[0, 0].item())
    assert seen == pytest.approx([-0.5, -0.5, -0.5], abs=1e-6)  # 1 down; then 1 down and 4 / 4 up


@every_method
def test_a_closure_sees_the_same_rule(make):
    """AdamW that gets its gradients inside step() ends where AdamW that got them before does."""
    found = []
    for inside in (False, True):
        model, tuner = attached(make, torch.float64)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        for step in range(5):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = mixed_loss(model, tokens(step))
                loss.backward()
                return loss

            if inside:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        found.append((tuner.step, model))
    assert found[0][0] == found[1][0] == 5
    parameters = zip(found[0][1].parameters(), found[1][1].parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in parameters)


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
@every_method
def test_checkpointing_changes_nothing(mode, make):
    found = []
    for kind in ("none", mode):
        torch.manual_seed(0)
        model = Blocks(kind).double().eval()
        tuner = st.attach(model, make())
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        for step in range(6):
            optimizer.zero_grad()
            x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
        found.append([p for n, p in model.named_parameters() if "selectune_" not in n])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))


@every_method
def test_looking_at_the_model_in_between_changes_nothing(make):
    def train(look):
        model, tuner = attached(make)
        for _ in steps(model, torch.optim.AdamW(tuner.parameters(), lr=1e-2), 6):
            if look:
                model.eval()
                with torch.no_grad():
                    model(tokens(3))
                model.train()
                tuner.verify()
                tuner.delta(allow_empty=True)
        return bits(model)

    assert same(train(False), train(True))


def test_a_step_without_gradients_does_not_count():
    _, tuner = attached(METHODS["weights"])
    torch.optim.SGD(tuner.parameters(), lr=0.1).step()
    assert tuner.step == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_round_of_gates_begins_at_the_weights_of_the_first(dtype):
    """The second round starts from the values of sparse training. The delta and detach still know the base."""
    method = st.Method(
        score=st.scores.change(), schedule=Rounds(30, 8, 2, 2), dense=st.phases.Gates(**GATES), name="gated twice"
    )
    model, tuner = attached(lambda: method, dtype)
    base = bits(model)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for _ in steps(model, optimizer, 4):
        pass
    assert (tuner.in_dense_phase, tuner.selected) == (True, 15)
    now = bits(model)
    assert 0 < sum(int((now[n] != base[n]).sum()) for n in base) <= 15
    tuner.engine.phase.write_weights()
    assert same(bits(model), now)
    for _ in steps(model, optimizer, 2, start=4):
        pass
    assert same(bits(model), now)  # rewound to the round's start
    assert tuner.selected == 30
    tuner.detach()
    assert same(bits(model), base)


# -- state dicts, resuming


@every_method
def test_a_state_dict_is_that_of_an_ordinary_model_and_loads(make):
    model, tuner = attached(make, torch.bfloat16)
    keys = set(Mixed(torch.bfloat16).state_dict())
    for _ in steps(model, torch.optim.AdamW(tuner.parameters(), lr=1e-2), 2):
        pass
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert set(state) == keys
    latents = whole(tuner)
    assert model.load_state_dict(state).missing_keys == []
    assert all(torch.equal(a, b) for a, b in zip(latents, whole(tuner), strict=True))  # masters kept what they know
    now = bits(model)
    mixed_loss(model, tokens(0))
    assert same(bits(model), now)
    other = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    if make is METHODS["gates"]:
        with pytest.raises(st.errors.IntegrityError, match="weights follow from other tensors"):
            model.load_state_dict(other)
        return
    model.load_state_dict(other)
    mixed_loss(model, tokens(0))
    assert torch.equal(model.linear.weight, other["linear.weight"])


@every_method
def test_weights_follow_a_fused_optimizer(make):
    """A fused step changes no version, and noise changes the weights even if the latents stay."""
    model, tuner = attached(make, seed=4)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2, fused=True)
    for _ in steps(model, optimizer, 2):
        assert tuner.in_dense_phase
        fresh, second = attached(make, seed=4)
        second.load_state_dict(tuner.state_dict())
        assert same(bits(model), bits(fresh))


@every_method
@pytest.mark.parametrize("at", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_phase_goes_on_to_the_bit(make, at, dtype):
    """What `DenseThenSparse.phase` holds, with the step and the ledger, is enough."""
    model, tuner = attached(make, dtype, seed=4)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for _ in steps(model, optimizer, at):
        pass
    phase, moments = tuner.engine.phase.phase(), copy.deepcopy(optimizer.state_dict())
    ledger = tuner.engine.ledger

    again, second = attached(make, dtype, seed=4)
    later = torch.optim.AdamW(second.parameters(), lr=1e-2)
    second.engine.tracker.load_state(at, tuner.engine.tracker.reached, {})  # which tensors are tapped
    mine = second.engine.ledger
    mine.pages, mine.free = list(ledger.pages), ledger.free
    with torch.no_grad():
        mine.offsets.copy_(ledger.offsets)
        mine.start.copy_(ledger.start)
    second.engine.phase.load_phase(phase)
    second.engine.tracker.follow_phase()
    later.load_state_dict(moments)
    assert second.in_dense_phase is tuner.in_dense_phase
    assert same(bits(model), bits(again))
    for one, other in ((model, optimizer), (again, later)):
        for _ in steps(one, other, 3, start=at):
            pass
    assert same(bits(model), bits(again))
    assert torch.equal(tuner.engine.ledger.offsets, second.engine.ledger.offsets)
    tuner = st.attach(nn.Linear(6, 6), make())
    with pytest.raises(st.errors.ConfigError, match="another model or method"):
        tuner.engine.phase.load_phase({"on": True, "latents": [[torch.zeros(2)]], "before": []})


# -- what cannot work is said at once


def test_an_optimizer_without_the_values_is_refused_at_its_first_step():
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    st.attach(model, st.lt_sft(30, 8))
    before = bits(model)
    mixed_loss(model, tokens(0)).backward()
    with pytest.raises(st.errors.OptimizerError, match="and not the tuner's offsets"):
        optimizer.step()
    assert same(bits(model), before)


def test_an_optimizer_over_frozen_weights_is_refused():
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    st.attach(model, gated())
    mixed_loss(model, tokens(0)).backward()
    with pytest.raises(st.errors.OptimizerError, match="nothing that the dense phase trains"):
        optimizer.step()


@every_method
def test_a_step_without_torchs_hooks_is_refused(make):
    model, tuner = attached(make)
    mixed_loss(model, tokens(0)).backward()
    with torch.no_grad():
        for p in tuner.parameters():
            if p.grad is not None:
                p.sub_(p.grad)
    with pytest.raises(st.errors.OptimizerError, match="whose hooks tell when the phase is over"):
        model(tokens(0))


def test_numbers_that_broke_are_not_ranked():
    model, tuner = attached(METHODS["weights"])
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for _ in steps(model, optimizer, 3):
        pass
    with torch.no_grad():
        model.linear.weight[0, 0] = float("nan")
    with pytest.raises(st.errors.NonFiniteError, match=r"at step 4 with NaN or infinity in \d+ tensors"):
        for _ in steps(model, optimizer, 1):
            pass
    assert tuner.selected == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["values first", "gates first"])
def test_two_optimizers_do_what_one_does_with_groups(order):
    """One optimizer holds the offsets and w, the other the gates. The steps of the first one count."""
    gates = []
    for several in (False, True):
        model, tuner = attached(lambda: gated(penalty=0.1))
        groups = tuner.parameter_groups(1e-2)
        assert [g["lr"] for g in groups] == [1e-2, 0.1]
        optimizers = [torch.optim.AdamW([g]) for g in groups] if several else [torch.optim.AdamW(groups)]
        for step in range(8):
            model.zero_grad()
            mixed_loss(model, tokens(step)).backward()
            for i in order if several else (0,):
                optimizers[i].step()
            if step == 2:
                gates.append([p.detach().clone() for p in groups[1]["params"]])
        assert (tuner.step, tuner.selected, tuner.verify().changed) == (8, 30, 30)
    assert all(torch.equal(a, b) for a, b in zip(*gates, strict=True))


def test_an_optimizer_made_between_two_dense_phases_is_refused():
    model, tuner = attached(lambda: st.lt_sft(30, 8, dense=2, rounds=2))
    for _ in steps(model, torch.optim.SGD(tuner.parameters(), lr=0.1), 3):
        pass
    late = torch.optim.SGD(tuner.parameters(), lr=0.1)
    with pytest.raises(st.errors.OptimizerError, match="holds nothing that the dense phase trains"):
        for _ in steps(model, late, 2, start=3):
            pass


def test_other_optimizers_too():
    for make in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adafactor):
        model, tuner = attached(lambda: st.lt_sft(30, 8, dense=2, rounds=2, train_fully="norm.*"))
        for _ in steps(model, make(tuner.parameters(), lr=1e-2), 8):
            pass
        assert (tuner.selected, tuner.verify().changed) == (30, 30), make
