"""One row per recipe; every row earns every check below. A recipe without a row fails the first test."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import selectune as st
from selectune.recipes import RECIPES

sys.path.insert(0, str(Path(__file__).parent / "train"))
from train_kit import Mixed, bits, changed, mixed_loss, same, steps, tokens


@dataclasses.dataclass(frozen=True)
class Row:
    method: st.Method
    at_attach: int  # selected before the first step
    after: int  # selected after 6 steps
    dense: int = 0
    grows: bool = True
    first_pass: bool = False  # reads a step's first backward pass only, so that micro-batches are not one larger batch
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW


ROWS = {
    "id3": Row(st.id3(60, 6), 0, 60),
    "repeat-d3": Row(st.repeat_d3(60, 6), 0, 60, grows=False),
    "static-d3": Row(st.static_d3(60), 0, 60),
    "increment-pafi": Row(st.increment_pafi(60, 6), 0, 60),
    "increment-random": Row(st.increment_random(60, 6), 0, 60),
    "repeat-random": Row(st.repeat_random(60, 6), 60, 60, grows=False),
    "pafi": Row(st.pafi(60), 60, 60),
    "fish": Row(st.fish(60, examples=3), 60, 60),
    "fish-dip": Row(  # an LSTM's two biases have one gradient: in mid-run their scores differ by rounding only
        st.fish_dip(60, 6, examples=2, every=2, scope=st.Scope(exclude="*bias_hh*")), 60, 60, grows=False
    ),
    "lift": Row(st.lift(60, 6, rank=2, every=2), 60, 60, grows=False),
    "child-tuning-d": Row(st.child_tuning_d(60), 60, 60),
    "movement": Row(st.movement(60, batches=3), 60, 60),
    "magnitude": Row(st.magnitude(60), 60, 60),
    "snip": Row(st.snip(60, batches=2), 60, 60),
    "speft": Row(st.speft(60, batches=2), 60, 60),
    "gem": Row(st.gem(60, batches=2), 60, 60),
    "rosa": Row(st.rosa(76, batches=2, adapter="norm.*"), 60, 60, dense=16),
    "grasp": Row(st.grasp(60, batches=2), 60, 60),
    "synflow": Row(st.synflow(60), 60, 60),
    "sparse-adapter": Row(st.sparse_adapter(60), 60, 60),
    "gallop": Row(st.gallop(60), 0, 60),
    "spiel-ag": Row(st.spiel_ag(60, 6, every=3, window=1), 60, 60, first_pass=True),
    "spiel-ma": Row(st.spiel_ma(60, 6, every=3, window=1), 60, 60, optimizer=st.SparseSM3),
    "rigl": Row(st.rigl(60, 6, every=2), 60, 60),
    "set": Row(st.sparse_evolution(60, 6, every=2), 60, 60),
    "s2ft": Row(st.s2ft(60, head=4, scope="@linear"), 60, 60),
    "smt": Row(st.smt(60, block=4, batches=2), 60, 60),
    "paca": Row(st.paca(60), 60, 60),
    "losia": Row(st.losia(60, batches=2), 60, 60),
    "bitfit": Row(st.bitfit(), 59, 59),
    "random": Row(st.random(60), 60, 60),
    "xattn": Row(st.xattn(scope="attention.*"), 0, 0, dense=288),
    "lt-sft": Row(st.lt_sft(60, 6), 0, 60),
    "diff-pruning": Row(st.diff_pruning(60, 6, gate_lr=0.01), 0, 60),
    "child-tuning-f": Row(st.child_tuning_f(0.25), 0, 0, dense=1580),
    "full": Row(st.full(), 0, 0, dense=1580),
}
VARIANTS = {
    "spiel-ag, windows handed on": Row(
        st.spiel_ag(60, 6, every=3, window=2, train_fully="norm.*"),
        60,
        60,
        dense=16,
        first_pass=True,
        optimizer=functools.partial(st.SparseAdamW, age="entry", weight_decay=0.1),
    ),
    "rigl, by the weight": Row(st.rigl(60, 6, every=2, drop="weight", decay="constant"), 60, 60),
    "id3, every 3": Row(st.id3(60, 6, every=3), 0, 60),
    "id3, until half of the steps": Row(st.id3(60, 6, until=0.5), 0, 60),
    "static-d3, three batches": Row(st.static_d3(60, batches=3), 60, 60),
    "id3, front": Row(st.id3(62, 6, spread="front"), 0, 62),
    "id3, density": Row(st.id3(0.05, 6), 0, 79),
    "id3, head trained fully": Row(st.id3(60, 6, train_fully=["norm.*", "conv.*"]), 0, 60, dense=216),
    "fish, labels of the model": Row(st.fish(60, examples=3, labels="model"), 60, 60),
    "pafi, random ties": Row(st.pafi(60, tie="random"), 60, 60),
    "lt-sft, 2 rounds, head": Row(  # an LSTM's two biases have one gradient: their changes differ by rounding only
        st.lt_sft(61, 6, 0.4, 2, scope=st.Scope(exclude="*bias_hh*"), train_fully=["norm.*", "conv.*"]), 0, 61, 216
    ),
    "diff-pruning, found, no groups": Row(
        st.diff_pruning(60, 6, dense=3, structured=False, start_from="found", train_fully="norm.*"), 0, 60, dense=16
    ),
    "sparse-adapter, curvature": Row(st.sparse_adapter(60, "grasp", temperature=1.0), 60, 60),
    "sparse-adapter, flow": Row(st.sparse_adapter(60, "synflow", scope="*weight"), 60, 60),
    "sparse-adapter, weights": Row(st.sparse_adapter(60, "magnitude", scope=["attention.*", "linear.*"]), 60, 60),
    "sparse-adapter, chance": Row(st.sparse_adapter(0.05, "random", train_fully="norm.*"), 78, 78, dense=16),
    "losia, again every 2 steps": Row(st.losia(60, 6, batches=2, every=2), 60, 60, grows=False),
    "id3 without the embedding": Row(st.id3(60, 6, scope=st.Scope(exclude="embed.*")), 0, 60),
}
every_row = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in (ROWS | VARIANTS).items()])


def calibration_loss(row):
    score = row.method.score
    if score is not None and score.parameters.get("labels") == "model":
        return lambda model, x: model(x)[:, 0]
    if score is not None and score.reads.value == "flow":
        return lambda model, x: model(x).sum()
    return mixed_loss


def attach(model, row, **arguments):
    examples = [tokens(s, n=1) for s in range(5)]
    return st.attach(model, row.method, calibration=examples, loss=calibration_loss(row), **arguments)


def run(row, dtype=torch.float32, count=6, **arguments):
    torch.manual_seed(0)
    model = Mixed(dtype)
    tuner = attach(model, row, **arguments)
    for _ in steps(model, row.optimizer(tuner.parameters(), lr=1e-2), count):
        pass
    return model, tuner


def test_every_recipe_has_its_row():
    assert list(ROWS) == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_and_whose(name):
    recipe = RECIPES[name]
    assert ROWS[name].method.name == name == recipe.name
    assert len(recipe.summary) > 20
    assert recipe.source
    assert recipe.reads
    assert "Source:" in (recipe.function.__doc__ or "") or name in ("random", "full")


@every_row
def test_exact_budget(row):
    model = Mixed()
    tuner = attach(model, row)
    assert tuner.selected == row.at_attach
    counts = [tuner.selected for _ in steps(model, row.optimizer(tuner.parameters(), lr=1e-2), 6)]
    assert counts[-1] == row.after == tuner.budget
    assert counts == sorted(counts)
    assert tuner.trained == tuner.touched + row.dense
    assert (tuner.touched == row.after) is row.grows


def filled(base, tuner):
    """What the base's bits are before the first step: under fill="zero", 0 wherever nothing is selected."""
    if tuner.method.fill == "keep":
        return base
    zeroed = {t.name: torch.zeros_like(base[t.name]) for t in tuner.engine.now.tensors}
    for name, flat in tuner.support.items():
        zeroed[name][flat] = base[name][flat]
    assert tuner.verify().zeroed == sum(b.numel() for b in zeroed.values()) - tuner.selected > 0
    return base | zeroed


@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_untouched_bits_and_exact_detach(row, dtype):
    torch.manual_seed(0)
    base = bits(Mixed(dtype))
    model, tuner = run(row, dtype)
    moved = changed(filled(base, tuner), bits(model))
    dense = {t.name for t in tuner.engine.now.whole}
    assert all(where <= set(tuner.delta().support[n].tolist()) for n, where in moved.items() if n not in dense)
    assert tuner.verify().changed == sum(len(w) for n, w in moved.items() if n not in dense) > 0 or dense
    tuner.detach()
    assert same(bits(model), base)


@every_row
def test_save_load_apply_revert(row, tmp_path):
    model, tuner = run(row)
    tuned = bits(model)
    file = tuner.save(tmp_path)
    torch.manual_seed(0)
    fresh = Mixed()
    base = bits(fresh)
    delta = st.load(tmp_path)
    with delta.applied(fresh):
        assert same(bits(fresh), tuned)
    assert same(bits(fresh), base)
    assert delta.info["method"]["name"] == row.method.name
    assert delta.info["budget"] == (tuner.budget if row.grows and row.method.schedule else None)
    json.dumps(delta.info, allow_nan=False)
    delta.merge(fresh)
    assert same(bits(fresh), tuned)
    assert tuner.save(tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


@every_row
def test_one_seed_is_one_run_and_its_bytes(row, tmp_path):
    first = run(row, seed=3)[1].save(tmp_path / "a.safetensors").read_bytes()
    assert run(row, seed=3)[1].save(tmp_path / "b.safetensors").read_bytes() == first


@every_row
def test_accumulation_is_one_larger_batch(row):
    def train(chunks):
        torch.manual_seed(0)
        model = Mixed(torch.float64)
        tuner = attach(model, row, accumulation_steps=chunks)
        kind = torch.optim.SGD if row.optimizer is torch.optim.AdamW else row.optimizer
        optimizer = kind(tuner.parameters(), lr=0.1)
        for i in range(4):
            optimizer.zero_grad()
            for part in tokens(i, n=4).chunk(chunks):
                (mixed_loss(model, part) / chunks).backward()
            optimizer.step()
        # By name and position: which of two almost equal scores got the lower slot is decided by rounding.
        return model.state_dict(), {n: sorted(f.tolist()) for n, f in tuner.support.items()}

    (whole, support), (parts, other) = train(1), train(2)
    if row.first_pass:
        assert {n: len(f) for n, f in support.items()} == {n: len(f) for n, f in other.items()}
        return
    assert support == other
    assert whole.keys() == parts.keys()
    assert all(torch.allclose(whole[name], parts[name], atol=1e-12) for name in whole)


@every_row
def test_tied_tensors_stay_tied_and_count_once(row):
    model, tuner = run(row)
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in tuner.support
    tuner.detach()
    assert model.head.weight is model.embed.weight


def test_methods_differ_in_what_they_choose():
    supports = {
        name: {n: f.tolist() for n, f in run(row)[1].support.items()} for name, row in ROWS.items() if row.after == 60
    }
    assert supports.pop("pafi") == supports["increment-pafi"]
    assert supports.pop("random") == supports["increment-random"]
    assert all(a == b or supports[a] != supports[b] for a in supports for b in supports)


def test_increment_pafi_arrives_in_order_of_magnitude():
    """methods 2.4: theta = [.3, -.1, .2, -.4], B = 3, T = 3 adds 1, then 2, then 0."""
    model = torch.nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.3, -0.1, 0.2, -0.4]]))
    tuner = st.attach(model, st.increment_pafi(3, 3))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    seen = []
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
        assert tuner.parameters()[0].grad.count_nonzero() == len(seen) + 1  # same step: selected, then trained
        optimizer.step()
        optimizer.zero_grad()
        seen.append(tuner.support["weight"].tolist())
    assert seen == [[1], [1, 2], [0, 1, 2]]


def test_pafi_on_zeros_warns_that_order_decides(caplog):
    """methods 2.5: A = [.5, .6], Bz = Cz = [0, 0, 0], budget 3: all of Bz, none of Cz."""
    values = {"A": [0.5, 0.6], "Bz": [0.0] * 3, "Cz": [0.0] * 3}
    model = torch.nn.ParameterDict({n: torch.nn.Parameter(torch.tensor(v)) for n, v in values.items()})
    assert {n: f.tolist() for n, f in st.attach(model, st.pafi(3)).support.items()} == {"Bz": [0, 1, 2]}
    assert "6 scalars in scope are exactly 0, more than the budget of 3" in caplog.text


def test_fish_sums_squares_of_single_examples():
    """methods 2.6: e1 = [1, -3, .5], e2 = [1, 3, .5]: the mean of the gradients hides entry 1, their squares do not."""
    model = torch.nn.Linear(3, 1, bias=False)
    examples = [torch.tensor([[1.0, -3.0, 0.5]]), torch.tensor([[1.0, 3.0, 0.5]])]
    tuner = st.attach(model, st.fish(1, examples=2), calibration=examples, loss=lambda m, x: m(x).sum())
    assert tuner.support["weight"].tolist() == [1]


def test_fish_with_the_models_labels_is_the_true_fisher():
    """methods 2.6: logits [theta, 0], theta = 0: F = .5 * .25 + .5 * .25 = .25."""
    from selectune.scope import Scope
    from selectune.train.choose.calibrate import calibrate

    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)

    def logits(m, x):
        return torch.cat([m(x), torch.zeros(1, 1)], 1)

    score = st.scores.fisher(examples=1, labels="model")
    (sums,) = calibrate(model, score, Scope().find(model).tensors, [torch.ones(1, 1)], logits)
    assert sums.item() == pytest.approx(0.25)
    with pytest.raises(st.errors.CalibrationError, match="A regression has no classes"):
        st.attach(model, st.fish(1, examples=1, labels="model"), calibration=[torch.ones(1, 1)], loss=lambda m, x: m(x))
    with pytest.raises(st.errors.CalibrationError, match="yielded 1 of the 2 examples"):
        st.attach(model, st.fish(1, examples=2), calibration=[torch.ones(1, 1)], loss=lambda m, x: m(x).sum())
    assert model.weight.requires_grad
    assert model.weight.grad is None


@every_row
@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_state_saved_in_mid_run_continues_bit_for_bit(row, after, accumulation, tmp_path):
    """Through torch.load(weights_only=True), on a fresh model; the optimizer's own state beside it."""

    def begin():
        torch.manual_seed(0)
        model = Mixed()
        tuner = attach(model, row, accumulation_steps=accumulation)
        return model, tuner, row.optimizer(tuner.parameters(), lr=1e-2)

    def go_on(model, optimizer, first, last):
        for number in range(first * accumulation, last * accumulation):
            mixed_loss(model, tokens(number)).backward()
            if number % accumulation == accumulation - 1:
                optimizer.step()
                optimizer.zero_grad()

    model, tuner, optimizer = begin()
    go_on(model, optimizer, 0, after)
    torch.save({"tuner": tuner.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    json.dumps(tuner.state_dict()["info"], allow_nan=False)
    go_on(model, optimizer, after, 6)

    model_2, tuner_2, optimizer_2 = begin()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    tuner_2.load_state_dict(saved["tuner"])
    optimizer_2.load_state_dict(saved["optimizer"])
    go_on(model_2, optimizer_2, after, 6)
    assert same(bits(model), bits(model_2))
    assert tuner_2.events == tuner.events
    assert tuner_2.delta().to_bytes() == tuner.delta().to_bytes()
    tuner_2.detach()
    torch.manual_seed(0)
    assert same(bits(model_2), bits(Mixed()))
