"""Drop and grow: the literal vectors, what optimizers are told, skipped steps, scalers, memory, resuming."""

from __future__ import annotations

import pytest
import torch
from exchange_kit import changes, growing, one, plant
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from train_kit import Blocks, Mixed, bits, mixed_loss, same, tokens

import selectune as st

D3 = st.scores.d3(exp=0.0)


def adamw(tuner, **arguments):
    return st.SparseAdamW(tuner.parameters(), **({"age": "entry", "weight_decay": 0.0} | arguments))


def supports(tuner):
    return {name: flat.tolist() for name, flat in tuner.support.items()}


def feed(tuner, optimizer, gradient):
    optimizer.zero_grad()
    tuner.model(torch.tensor([gradient])).sum().backward()
    optimizer.step()


def watched_run():
    """methods 2.12, AG: 6 entries, K = 3, window of 2; the exchange is due before the third forward."""
    method = growing(D3, 3, 100, every=50, window=2, fraction=0.34, decay="constant")
    tuner = st.attach(one([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), method)
    plant(tuner, [0, 2, 4], [0.5, -0.01, 0.2])
    optimizer = adamw(tuner, lr=0.0)
    feed(tuner, optimizer, [9.0, 1.0, 0.5, 7.0, 8.0, 2.0])
    assert tuner.engine.ledger.pages[0].watched.flat.tolist() == [0, 3, 4]
    feed(tuner, optimizer, [1.0, 3.0, 1.0, 5.0, -2.0, 30.0])
    return tuner, optimizer


def test_drop_the_smallest_change_grow_the_best_candidate():
    """n = 1: index 2 goes, candidates are {0, 4, 3}, of which only 3 is not active: [0, 3, 4], phi = [.5, 0, .2]."""
    tuner, optimizer = watched_run()
    assert supports(tuner) == {"weight": [0, 2, 4]}
    tuner.model(torch.ones(1, 6))
    assert changes(tuner) == pytest.approx({0: 0.5, 3: 0.0, 4: 0.2})
    weight = tuner.model.weight[0]
    assert weight[2].item() == torch.tensor(0.3).item()  # the base again, bit for bit
    assert weight[3].item() == torch.tensor(0.4).item()
    assert tuner.engine.ledger.pages[0].watched is None
    assert tuner.verify().touched == 3
    tuner.engine.step_hooks._inform(optimizer)
    state, slot = optimizer.state[tuner.parameters()[0]], tuner.engine.ledger.pages[0].slot[1]
    assert state["age"][slot].item() == 2
    assert state["exp_avg"][slot].item() == pytest.approx(6 * (1 - 0.81))
    assert state["exp_avg_sq"][slot].item() == pytest.approx(37 * (1 - 0.998001))
    assert state["exp_avg"][slot].item() / (1 - 0.9**2) == pytest.approx(6)
    assert state["exp_avg_sq"][slot].item() / (1 - 0.999**2) == pytest.approx(37)


def test_with_a_shared_age_bias_correction_gives_the_window_back_too():
    tuner, _ = watched_run()
    tuner.model(torch.ones(1, 6))
    optimizer = adamw(tuner, age="shared", lr=0.0)
    (values,) = tuner.parameters()
    for _ in range(4):
        optimizer._step(values, torch.ones(3), optimizer.param_groups[0])
    optimizer.inherit(values, tuner.engine.tracker.chooser.new_entries)
    state, slot = optimizer.state[values], tuner.engine.ledger.pages[0].slot[1]
    assert state["exp_avg"][slot].item() / (1 - 0.9**4) == pytest.approx(6)
    assert state["exp_avg_sq"][slot].item() / (1 - 0.999**4) == pytest.approx(37)


def test_signed_sums_cancel():
    """An entry whose gradient changes its sign loses against a smaller one that does not."""
    tuner = st.attach(one([0.0] * 4), growing(D3, 2, 100, every=9, window=2, fraction=0.5, decay="constant"))
    plant(tuner, [0, 1], [0.5, 0.1])
    optimizer = adamw(tuner, lr=0.0)
    feed(tuner, optimizer, [0.1, 0.2, 5.0, 4.0])
    feed(tuner, optimizer, [0.1, 0.2, -5.0, 0.5])
    tuner.model(torch.ones(1, 4))
    assert supports(tuner) == {"weight": [0, 3]}


def test_grow_by_the_accumulators_of_rows_and_columns():
    """methods 2.12, MA: 2 x 2, active {(0, 0)}, r = [4, 1], c = [1, 9]: of 36, 1 and 9, (0, 1) grows."""
    model = nn.Linear(2, 2, bias=False)
    method = growing(st.scores.row_times_column(), 1, 10, every=2, window=1, fraction=1.0, regrow=False)
    tuner = st.attach(model, method)
    plant(tuner, [0], [0.5])
    tuner.engine.tracker.chooser.factors = (torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 9.0, 0.0]))
    tuner.engine.tracker.clock.step = 1
    tuner.engine.tracker.select_ahead()
    assert supports(tuner) == {"weight": [1]}
    assert changes(tuner) == {1: 0.0}


def test_the_accumulators_are_never_multiplied_out_whole(monkeypatch):
    from selectune.train.choose import dropping

    def run():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
        tuner = st.attach(net, st.spiel_ma(30, 12, every=4, window=1))
        optimizer = st.SparseSM3(tuner.parameters(), lr=0.1)
        for i in range(12):
            optimizer.zero_grad()
            net(torch.randn(4, 7, generator=torch.Generator().manual_seed(i))).square().sum().backward()
            optimizer.step()
        return supports(tuner)

    whole = run()
    monkeypatch.setattr(dropping, "PIECE", 20)
    assert run() == whole


def test_growing_by_the_step_s_gradient_trains_new_entries_in_that_step():
    tuner = st.attach(one([0.0] * 4), growing(D3, 2, 100, every=1, fraction=0.5, decay="constant"))
    plant(tuner, [0, 1], [0.5, 0.1])
    optimizer = torch.optim.SGD(tuner.parameters(), lr=1.0, momentum=0.9)
    feed(tuner, optimizer, [0.0, 0.0, 0.0, 0.0])
    feed(tuner, optimizer, [1.0, 2.0, 0.5, 4.0])
    assert changes(tuner) == pytest.approx({0: -0.5, 3: -4.0})
    feed(tuner, optimizer, [0.0, 0.0, 3.0, 0.0])  # entry 0 goes; its momentum does not stay in the slot
    assert changes(tuner) == pytest.approx({2: -3.0, 3: -4.0 - 3.6})


def test_an_entry_dropped_and_grown_keeps_its_value_and_state():
    tuner = st.attach(one([0.0] * 4), growing(D3, 2, 100, every=1, fraction=1.0, decay="constant"))
    plant(tuner, [0, 1], [0.5, 0.1])
    optimizer = torch.optim.SGD(tuner.parameters(), lr=1.0, momentum=0.5)
    feed(tuner, optimizer, [0.0, 1.0, 0.0, 0.0])
    slot = tuner.engine.ledger.pages[0].slot[1].item()
    feed(tuner, optimizer, [0.0, 3.0, 0.0, 2.0])  # all are dropped; 1 and 3 grow: 1 stays where it is
    assert tuner.engine.ledger.pages[0].slot.tolist() == [slot, 1 - slot]
    assert changes(tuner) == pytest.approx({1: 0.1 - 1.0 - 3.5, 3: -2.0})
    feed(tuner, optimizer, [0.0, 0.0, 0.0, 1.0])  # fewer grow than are dropped: the smallest only are replaced
    assert set(changes(tuner)) == {1, 3}


@pytest.mark.parametrize("drop", ["change", "weight"])
def test_what_is_small_is_a_choice(drop):
    method = growing(D3, 2, 9, every=1, fraction=0.5, decay="constant", drop=drop)
    tuner = st.attach(one([3.0, 0.0, 0.0, 0.0]), method)
    plant(tuner, [0, 1], [0.1, 0.5])
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.0)
    feed(tuner, optimizer, [0.0] * 4)
    feed(tuner, optimizer, [0.0, 0.0, 0.0, 1.0])
    assert supports(tuner) == {"weight": [1, 3] if drop == "change" else [0, 3]}


METHODS = {
    "watch": st.spiel_ag(60, 12, every=4, window=2, fraction=0.5, decay="constant"),
    "factors": st.spiel_ma(60, 12, every=4, window=2, fraction=0.5, decay="constant"),
    "gradient": st.rigl(60, 12, every=2, until=1.0, fraction=0.5),
    "afresh": st.repeat_d3(60, 12, every=2),
    "chance": st.sparse_evolution(60, 12, every=2, until=1.0, fraction=0.5),
}


def train(name, batches, dtype=torch.float64, scaler=None, chunks=1, late=False, fused=False):
    torch.manual_seed(0)
    model = Mixed(dtype)
    tuner = st.attach(model, METHODS[name], accumulation_steps=chunks)
    optimizer = st.SparseSM3(tuner.parameters(), lr=1e-2) if name == "factors" else adamw(tuner, lr=1e-2)
    if fused:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2, fused=True)
    for i in batches:
        optimizer.zero_grad()
        for part in tokens(abs(i), n=4).chunk(chunks):
            loss = mixed_loss(model, part) / chunks
            (loss if scaler is None else scaler.scale(loss)).backward()
        if i < 0:
            tuner.parameters()[0].grad[0] = torch.inf
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update(4.0 if late else None)
    return tuner, optimizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_the_scaler_skips_leaves_no_trace(name, dtype):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10_000)

    skipping, _ = train(name, [n for i in range(10) for n in (-20 - i, -30 - i, i)], dtype, scaler(), late=True)
    clean, _ = train(name, range(10), dtype, scaler(), late=True)
    assert same(bits(skipping.model), bits(clean.model))
    assert torch.equal(skipping.engine.ledger.offsets, clean.engine.ledger.offsets)
    assert supports(skipping) == supports(clean)
    assert skipping.events["skipped_steps"] == 20


@pytest.mark.parametrize("name", ["gradient", "afresh", "watch"])
def test_a_fused_optimizer_skips_a_step_by_itself(name):
    """The optimizer unscales within its step, and the watched gradients are unscaled by the same factor."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10_000) for _ in range(2)]
    batches = [n for i in range(10) for n in (-20 - i, i)]
    skipping, _ = train(name, batches, torch.float64, scalers[0], late=True, fused=True)
    clean, _ = train(name, range(10), torch.float64, scalers[1], late=True, fused=True)
    assert same(bits(skipping.model), bits(clean.model))
    assert supports(skipping) == supports(clean)
    if name == "watch":  # a window is open
        unscaled, _ = train(name, range(10), torch.float64, fused=True)
        sums, plain = (t.engine.tracker.chooser.state()["window"]["square"] for t in (clean, unscaled))
        assert sums
        assert all(torch.equal(sums[i], plain[i]) for i in plain)


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_scaler_s_factor_does_not_enter_the_moments(chunks):
    plain, one_state = train("watch", range(8), chunks=chunks)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scaled, state = train("watch", range(8), scaler=scaler, chunks=chunks)
    assert supports(plain) == supports(scaled)
    assert same(bits(plain.model), bits(scaled.model))
    for key, value in one_state.state[plain.parameters()[0]].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(state.state[scaled.parameters()[0]][key]))


def test_a_window_with_a_nan_exchanges_nothing(caplog):
    tuner = st.attach(one([0.0] * 4), growing(D3, 2, 100, every=4, window=2, fraction=0.5, decay="constant"))
    before = supports(tuner)
    optimizer = adamw(tuner, lr=0.0)
    tuner.model(torch.tensor([[float("nan"), 1.0, 1.0, 1.0]])).sum().backward()
    tuner.parameters()[0].grad.zero_()  # the user repairs the values' gradient and goes on
    optimizer.step()
    assert "are not finite" in caplog.text
    for _ in range(4):
        feed(tuner, optimizer, [1.0, 2.0, 3.0, 4.0])
    assert supports(tuner) == before
    for _ in range(3):
        feed(tuner, optimizer, [1.0, 2.0, 3.0, 4.0])
    assert supports(tuner) != before


def test_a_window_that_opened_in_a_skipped_step_is_gone():
    """The step is taken again with NaN as gradients: no window is open, not even that of the first attempt."""
    windows = []
    for skips in (False, True):
        tuner = st.attach(one([0.0] * 4), growing(D3, 2, 100, every=4, window=2, fraction=0.5, decay="constant"))
        before, optimizer = supports(tuner), adamw(tuner, lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        attempts = [([1.0, 2.0, 3.0, 4.0], torch.inf)] * skips + [([float("nan"), 1.0, 1.0, 1.0], 0.0)]
        for gradient, values in attempts:
            optimizer.zero_grad()
            scaler.scale(tuner.model(torch.tensor([gradient])).sum()).backward()
            tuner.parameters()[0].grad.fill_(values)
            scaler.step(optimizer)
            scaler.update(4.0)
        assert (tuner.step, tuner.events["skipped_steps"]) == (1, int(skips))
        windows.append((tuner.engine.tracker.chooser.watching, tuner.engine.tracker.chooser.state()["window"]))
        for _ in range(3):  # to the exchange that this window would have ended in
            feed(tuner, optimizer, [1.0, 2.0, 3.0, 4.0])
        assert supports(tuner) == before
    assert windows[0] == windows[1]
    assert windows[1][1]["steps"] == 0


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, views of weights left out."""

    def __init__(self, model):
        super().__init__()
        self.numel, self.weights = 0, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.weights:
                self.numel = max(self.numel, t.numel())
        return out


def test_memory_is_small_but_for_the_first_pass_of_a_window():
    """A dense gradient (65,536 numbers) is formed in one backward pass of a window; all that stays is O(B)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 8))
    tuner = st.attach(net, st.spiel_ag(300, 40, every=8, window=3), accumulation_steps=2)
    optimizer = adamw(tuner, lr=1e-3)
    dense = []
    for step in range(20):
        optimizer.zero_grad()
        for part in range(2):
            with Largest(net) as seen:
                net(torch.randn(4, 256)).square().mean().backward()
            if seen.numel >= 65_536:
                dense.append((step, part))
        with Largest(net) as seen:
            optimizer.step()
        assert seen.numel < 65_536
        window = tuner.engine.tracker.chooser.state()["window"]
        kept = [t for key in ("watched", "sum", "square") for t in window[key].values()]
        assert sum(t.numel() * t.element_size() for t in kept) <= 300 * (8 + 4 + 4)
    assert dense == [(0, 0), (7, 0), (15, 0)]


def test_no_gradient_is_formed_for_accumulators_and_chance():
    for method, kind in ((st.spiel_ma(60, 12, every=4, window=2), st.SparseSM3),
                         (st.sparse_evolution(60, 12, every=2), torch.optim.SGD)):  # fmt: skip
        net = nn.Linear(256, 256)
        tuner = st.attach(net, method)
        optimizer = kind(tuner.parameters(), lr=1e-3)
        for _ in range(8):
            optimizer.zero_grad()
            out = net(torch.randn(4, 256)).square().mean()
            with Largest(net) as seen:
                out.backward()
            assert seen.numel < 65_536
            optimizer.step()


@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_checkpointing_changes_nothing(mode):
    def run(mode):
        torch.manual_seed(0)
        net = Blocks(mode).double()
        tuner = st.attach(net, st.spiel_ag(40, 12, every=4, window=2, fraction=0.5))
        optimizer = adamw(tuner, lr=1e-2)
        seen = []
        for i in range(10):
            torch.manual_seed(i)
            net(torch.randn(5, 6, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(supports(tuner))
        return seen

    assert run(mode) == run("none")


def test_an_optimizer_without_accumulators_is_refused_before_it_steps():
    model = nn.Linear(4, 4)
    tuner = st.attach(model, st.spiel_ma(6, 10))
    before = bits(model)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(st.errors.OptimizerError, match=r"AdamW holds no such thing. Take selectune.SparseSM3"):
        optimizer.step()
    assert same(bits(model), before)


def test_combinations_that_make_no_sense_are_refused():
    grow = st.schedule.DropGrow(5, 10)
    with pytest.raises(st.errors.ConfigError, match="needs a selection that divides them"):
        st.Method(score=D3, schedule=grow)
    with pytest.raises(st.errors.ConfigError, match="must read one of nothing, weight, gradient, factors"):
        st.Method(score=st.scores.snip(), schedule=grow, select=st.select.PerTensor())
    with pytest.raises(st.errors.ConfigError, match="needs a schedule that drops and grows"):
        st.Method(score=st.scores.row_times_column(), schedule=st.schedule.OneShot(5))
