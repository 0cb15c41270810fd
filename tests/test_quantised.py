"""Quantised bases: the stored bits never move, and what is trained beside them is what full precision would train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quant_kit import EXACT, QUANTISE, Rows8, base, dequantised, net, stored
from torch import Tensor, nn

import selectune as st
from selectune import train as train_room
from selectune.beside import side_of
from selectune.errors import BaseMismatchError, ConfigError, DeltaError, ScopeError, TunerError
from selectune.interop.bridges import OUT, export
from selectune.interop.sync import PatchStream
from selectune.models.restore import Source
from selectune.quantised import Quantised, quantised_weights

METHODS: dict[str, Callable[[], st.Method]] = {
    "id3": lambda: st.id3(budget=60, steps=6),
    "pafi": lambda: st.pafi(budget=90, tie="random"),
    "random": lambda: st.random(budget=60),
    "spiel-ag": lambda: st.spiel_ag(budget=60, steps=6, every=2, window=1),
    "repeat-d3": lambda: st.repeat_d3(budget=60, steps=6, every=2),
}


def batches() -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(5)
    return [(torch.randn(24, 32, generator=source), torch.randn(24, 16, generator=source)) for _ in range(6)]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0, last: int = 6) -> list[float]:
    losses = []
    for x, y in batches()[first:last]:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(model: nn.Module, method: st.Method) -> tuple[st.Tuner, list[float]]:
    tuner = st.attach(model, method, seed=3)
    return tuner, steps(model, torch.optim.AdamW(tuner.parameters(), lr=1e-2))


def same(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True)
    )


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(batches()[0][0])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", EXACT)
def test_training_beside_is_training_the_dequantised_model(kind, name):
    model = base(kind)
    tuner, losses = train(model, METHODS[name]())
    plain, wanted = train(dequantised(base(kind)), METHODS[name]())
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert tuner.support.keys() == plain.support.keys()
    assert all(torch.equal(flat, plain.support[key]) for key, flat in tuner.support.items())
    assert same(stored(base(kind)), stored(model))
    assert tuner.verify().selected == tuner.selected


@pytest.mark.parametrize("drawn", [st.paca, st.random], ids=["units", "entries"])
def test_what_is_drawn_reads_no_numbers(drawn, monkeypatch):
    """To dequantise a weight costs its whole size; a choice by chance needs its shape only."""
    read = Quantised.dequantise
    reads: list[str] = []
    monkeypatch.setattr(Quantised, "dequantise", lambda self: (reads.append("read"), read(self))[1])
    tuner = st.attach(base("own"), drawn(budget=60), seed=3)
    assert tuner.selected == 60
    assert reads == []


@pytest.mark.parametrize("kind", QUANTISE)
def test_saved_beside_a_fresh_base_it_gives_the_same_bits(kind, tmp_path):
    model = base(kind)
    logits(model)  # some kinds move their scales in the first forward
    tuner, _ = train(model, st.id3(budget=60, steps=6))
    trained = logits(model)
    path = tuner.save(tmp_path)
    tuner.detach()
    fresh = base(kind)
    assert torch.equal(logits(model), logits(fresh))
    assert not torch.equal(trained, logits(fresh))
    delta = st.load(path)
    delta.apply(fresh, full=True)
    assert torch.equal(logits(fresh), trained)
    assert same(stored(base(kind)), stored(fresh))
    assert torch.equal(logits(copy.deepcopy(fresh)), trained)
    delta.revert(fresh)
    assert torch.equal(logits(fresh), logits(base(kind)))
    assert delta.verify(fresh, full=True).ok
    assert not any(module._forward_hooks for module in fresh.modules())


def test_another_base_is_refused():
    tuner, _ = train(base("own"), st.id3(budget=60, steps=6))
    delta = tuner.delta()
    one_bit = base("own")
    one_bit[3].weight.data[3, 4] ^= 1
    scale = base("own")
    scale[3].scale[2] *= 1 + 2**-20
    assert delta.verify(base("own"), full=True).ok
    for other in (one_bit, scale):
        report = delta.verify(other)
        assert not report.ok
        assert "stored in other bits" in str(report.problem)
    for other in (base("own", seed=1), dequantised(base("own"))):
        assert not delta.verify(other).ok
    assert "not quantised here" in str(delta.verify(dequantised(base("own"))).problem)
    plain, _ = train(dequantised(base("own")), st.id3(budget=60, steps=6))
    assert "is quantised here" in str(plain.delta().verify(base("own")).problem)


def test_nothing_is_trained_on_top_of_offsets_beside_the_base():
    """A digest of stored bits would not tell such a base from the bare one."""
    tuner, _ = train(base("own"), st.id3(budget=60, steps=6))
    delta = tuner.delta()
    model = base("own")
    bare = model(x := torch.randn(3, 32))
    delta.apply(model)
    applied = model(x)
    for there in (model, copy.deepcopy(model)):
        for scope in ("*", "2.*"):
            with pytest.raises(TunerError, match=r"is applied beside the quantised weights of Sequential.*Revert it"):
                st.attach(there, st.id3(budget=10, steps=2, scope=scope))
        assert torch.equal(there(x), applied)
    delta.revert(model)
    assert torch.equal(model(x), bare)
    st.attach(model, st.id3(budget=10, steps=2)).detach()


def test_a_weight_that_moves_in_training_is_found():
    model = base("own")
    tuner, _ = train(model, st.id3(budget=60, steps=6))
    model[0].weight.data[3, 4] ^= 1
    with pytest.raises(st.errors.IntegrityError, match=r"0\.weight"):
        tuner.verify()


def test_a_shelf_switches_between_deltas_beside_one_base():
    made = {}
    for name, method in (("a", st.id3(budget=60, steps=6)), ("b", st.random(budget=60))):
        model = base("own")
        tuner, _ = train(model, method)
        made[name] = tuner.delta(), logits(model)
    model = base("own")
    plain, shelf = logits(model), st.Shelf(model, {name: delta for name, (delta, _) in made.items()})
    for name in ("a", "b", "a", None, "b", "b", "a", None):
        shelf.switch(name)
        assert torch.equal(logits(model), plain if name is None else made[name][1])
        assert shelf.active == name
    for patch in made["a"][0].patches:
        assert patch.beside == patch.name.endswith(("0.weight", "3.weight"))


def test_a_prepared_switch_sees_values_of_others_beside_the_weight(monkeypatch):
    """The second time round, no digest of a base is taken; a stray value still sends the switch the careful way."""
    deltas = {n: train(base("own"), m)[0].delta() for n, m in (("a", st.random(budget=60)), ("b", st.pafi(budget=90)))}
    model = base("own")
    shelf = st.Shelf(model, deltas)
    for name in ("a", "b", None):
        shelf.switch(name)
    taken: list[Any] = []
    monkeypatch.setattr(Quantised, "digest", lambda self: taken.append(self) or "0" * 16)
    for name in ("a", "b", "a"):
        shelf.switch(name)
    assert not taken
    flat = deltas["b"].support["0.weight"]
    stray = flat[~torch.isin(flat, deltas["a"].support["0.weight"])][:1]
    side_of(quantised_weights(model)[id(model[0].weight)]).scatter(stray, torch.ones(1))
    with pytest.raises(BaseMismatchError):
        shelf.switch("b")
    assert taken


def test_stacked_deltas_come_off_in_turn():
    first, second = (train(base("own"), m)[0].delta() for m in (st.id3(budget=60, steps=6), st.random(budget=60)))
    model = base("own")
    first.apply(model)
    one = logits(model)
    second.apply(model, stack=True)
    second.revert(model)
    assert torch.equal(logits(model), one)
    first.revert(model)
    assert torch.equal(logits(model), logits(base("own")))


def offsets(delta: st.Delta) -> dict[str, torch.Tensor]:
    """The offsets beside quantised weights, as whole tensors in float64."""
    found = {}
    for patch in delta.patches:
        if patch.beside:
            found[patch.name] = torch.zeros(patch.numel, dtype=torch.float64)
            found[patch.name][patch.indices] = patch.values.double()
    return found


@pytest.mark.parametrize("given", [True, False], ids=["base", "old values"])
def test_offsets_are_added_and_scaled(given, tmp_path):
    """Against float64: offsets add up, rounded once; the layer norm's values do so as differences from the base."""
    tuners = [train(base("own"), m)[0] for m in (st.id3(budget=200, steps=6), st.random(budget=300))]
    first, second = (tuner.delta(old_values=not given) for tuner in tuners)
    known = {"base": base("own")} if given else {}
    for made, (a, b) in (
        (st.algebra.add([first, second], **known), (1.0, 1.0)),
        (st.algebra.add([first, second], weights=[0.3, -2.0], **known), (0.3, -2.0)),
        (st.algebra.scale(first, 0.7, **known), (0.7, 0.0)),
        (st.algebra.negate(second, **known), (0.0, -1.0)),
        (st.algebra.dare([first], drop=0.0, **known), (1.0, 0.0)),
    ):
        one, two = offsets(first), offsets(second)
        for name, found in offsets(made).items():
            assert torch.equal(found.float(), (a * one[name] + b * two[name]).float()), name
        assert {patch.name for patch in made.patches if patch.beside} == {"0.weight", "3.weight"}
        model = base("own")
        st.load(made.save(tmp_path / made.digest)).apply(model, full=True)
        assert same(stored(base("own")), stored(model))
    assert st.algebra.overlap(first, second).shared > 0
    assert st.algebra.ties([first, second], density=0.5, **known).selected <= first.selected + second.selected
    assert st.algebra.cut(first, 50, **known).selected == 50


def test_a_sum_of_offsets_apart_is_one_after_the_other():
    deltas = [train(base("own"), st.random(budget=60, scope=(scope,)))[0].delta() for scope in ("0.*", "3.*")]
    stacked, summed = base("own"), base("own")
    deltas[0].apply(stacked)
    deltas[1].apply(stacked, stack=True)
    st.algebra.add(deltas, base=base("own")).apply(summed)
    assert torch.equal(logits(stacked), logits(summed))


def test_offsets_beside_other_bits_are_not_added():
    mine = train(base("own"), st.random(budget=60))[0].delta(old_values=True)
    moved = base("own")
    moved[0].weight.data[3, 4] ^= 1
    plain = dequantised(base("own"))
    for other in (moved, plain):
        theirs = train(other, st.random(budget=60))[0].delta(old_values=True)
        with pytest.raises(BaseMismatchError):
            st.algebra.add([mine, theirs])
        infos = [{**delta.info, "base": {**delta.info["base"], "weights": None}} for delta in (mine, theirs)]
        unsure = [st.Delta(d.patches, d.dense, info) for d, info in zip((mine, theirs), infos, strict=True)]
        with pytest.raises(BaseMismatchError, match=r"stored bits|quantised parameter"):
            st.algebra.add(unsure)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path):
    model = base("own")
    tuner = st.attach(model, METHODS[name](), seed=3)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    steps(model, optimizer, 0, 3)
    train_room.write_state(tmp_path / "state", tuner.state_dict())
    moments = copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, 3)

    fresh = base("own")
    again = st.attach(fresh, METHODS[name](), seed=3)
    later = torch.optim.AdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(train_room.read_state(tmp_path / "state"))
    later.load_state_dict(moments)
    steps(fresh, later, 3)
    assert again.delta().to_bytes() == tuner.delta().to_bytes()


def test_what_cannot_work_is_refused(tmp_path):
    model, before = base("own"), logits(base("own"))
    for method in (st.diff_pruning(budget=60, steps=6), st.sparse_adapter(budget=60), st.fish(budget=60)):
        with pytest.raises(ConfigError, match="bits of a quantised weight"):
            st.attach(model, method)
    with pytest.raises(ScopeError, match="cannot be trained whole"):
        st.attach(model, st.full())
    tuner, _ = train(model, st.id3(budget=60, steps=6))
    delta = tuner.delta()
    tuner.detach()
    with pytest.raises(DeltaError, match="beside quantised weights"):
        delta.merge(model)
    for kind in sorted({*OUT} - {"dequantised"}):
        with pytest.raises(DeltaError, match="so it cannot be exported"):
            export(kind, Source("tiny"), delta.save(tmp_path / kind), tmp_path / "out")
    again = st.attach(model, st.random(budget=60))
    with pytest.raises(ConfigError, match="none is sent"):
        PatchStream(again)
    again.detach()
    assert torch.equal(logits(model), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_floats_freeze_the_quantised_weights_too(caplog):
    model = base("own")
    model[2].weight.requires_grad_(False)
    names = [tensor.name for tensor in st.Scope().find(model).tensors]
    assert names == ["0.bias", "2.bias"]
    assert "2 quantised weights are left out" in caplog.text


def test_the_scope_counts_entries_of_the_weight_and_its_owners():
    model = nn.Sequential(nn.Embedding(4, 8), base("own"))
    assert {tensor.form.numel() for tensor in st.Scope(include="1.0.weight").find(model).tensors} == {32 * 64}
    tied = base("own")
    again: Any = Rows8(nn.Linear(32, 64))
    again.weight = tied[0].weight
    tied.append(again)
    assert len(quantised_weights(tied)[id(tied[0].weight)].owners) == 2


def test_gradients_reach_the_input_through_the_offsets():
    """The input's gradient is that of the dequantised model with the same values."""
    model = base("own")
    tuner, _ = train(model, st.random(budget=300))
    plain = dequantised(base("own"))
    delta = tuner.delta()
    with torch.no_grad():
        for name, flat in delta.support.items():
            weight, values = plain.get_parameter(name), delta.values[name]
            beside = next(p.beside for p in delta.patches if p.name == name)
            weight.view(-1)[flat] = weight.view(-1)[flat] + values if beside else values
    tuner.detach()
    delta.apply(model)
    x = batches()[0][0]
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(mine).square().sum().backward()
    plain(theirs).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert not torch.equal(net()(x), model(x))
