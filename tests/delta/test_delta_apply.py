"""Deltas on models: all or nothing, one order of application, what verify reports."""

from __future__ import annotations

import copy

import pytest
import torch
from delta_kit import Bag, make_delta, small, snapshot
from torch import nn

from selectune import bits
from selectune.delta import Delta, base_info, diff
from selectune.errors import BaseMismatchError, DeltaStateError, IntegrityError


def single(model: Bag, at: int, value: float, **more) -> Delta:
    return make_delta(model, {"w": torch.tensor([at])}, {"w": torch.tensor([value])}, **more)


class Planted(Exception):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [Planted, MemoryError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("act", ["apply", "revert", "merge"])
def test_all_or_nothing_at_every_tensor(monkeypatch, tries, act, error, when):
    model, delta = small()
    if act == "revert":
        delta.apply(model)
    before = snapshot(model)
    for k in range(10):
        left = [k]

        def failing(real, left=left):
            def write(*args):
                left[0] -= 1
                if left[0] == -1:
                    if when == "after":
                        real(*args)
                    raise error
                real(*args)

            return write

        with monkeypatch.context() as patched:
            patched.setattr(bits, "scatter", failing(bits.scatter))
            patched.setattr(bits, "overwrite", failing(bits.overwrite))
            try:
                getattr(delta, act)(model)
                break
            except error:
                assert snapshot(model) == before
    assert k == 4
    tries(k)
    assert snapshot(model) != before


def test_apply_twice_is_refused():
    model, delta = small()
    delta.apply(model)
    after = snapshot(model)
    for stack in (False, True):
        with pytest.raises(DeltaStateError, match="applied to this model already"):
            delta.apply(model, stack=stack)
    with pytest.raises(DeltaStateError, match="already"):
        Delta.from_bytes(delta.to_bytes()).apply(model)
    assert snapshot(model) == after


def test_revert_twice_is_refused():
    model, delta = small()
    before = snapshot(model)
    delta.apply(model)
    delta.revert(model)
    with pytest.raises(DeltaStateError, match="does not hold its values"):
        delta.revert(model)
    plain = single(Bag({"w": torch.zeros(3)}), 0, 1.0)
    with pytest.raises(DeltaStateError, match="old_values=True"):
        plain.revert(Bag({"w": torch.zeros(3)}))
    assert snapshot(model) == before


def test_a_reloaded_delta_reverts_what_its_twin_applied():
    model, delta = small()
    before = snapshot(model)
    delta.apply(model)
    Delta.from_bytes(delta.to_bytes()).revert(model)
    assert snapshot(model) == before


def test_stack_in_order_and_out_of_order():
    model = Bag({"w": torch.zeros(6)})
    a, b = single(model, 1, 1.0, info={"method": {"name": "a"}}), single(model, 2, 2.0, info={"method": {"name": "b"}})
    before = snapshot(model)
    a.apply(model)
    with pytest.raises(DeltaStateError, match="stack=True"):
        b.apply(model)
    b.apply(model, stack=True)
    assert model.w.tolist() == [0, 1, 2, 0, 0, 0]
    with pytest.raises(DeltaStateError, match=r"lies under b of 1 scalars.*oldest first: a of .*, b of"):
        a.revert(model)
    with pytest.raises(DeltaStateError, match=r"while other deltas are applied: a of .*, b of"):
        b.merge(model)
    with pytest.raises(DeltaStateError, match="is applied"):
        a.verify(model)
    b.revert(model)
    with pytest.raises(DeltaStateError, match="it is not applied, but a of"):
        b.revert(model)
    a.revert(model)
    assert snapshot(model) == before


def test_overlapping_deltas_of_one_base_stack_and_come_off_exactly():
    model = Bag({"w": torch.zeros(6), "v": torch.zeros(2)})
    before = snapshot(model)
    three = {"w": torch.tensor([1, 2, 3])}
    a = make_delta(model, three, {"w": torch.tensor([1.0, 1.0, 1.0])}, dense={"v": torch.tensor([5.0, 6.0])})
    b = make_delta(
        model,
        {"w": torch.tensor([0, 2, 3, 5]), "v": torch.tensor([1])},
        {"w": torch.tensor([2.0, 2.0, 2.0, 2.0]), "v": torch.tensor([7.0])},
    )
    c = make_delta(model, {"w": torch.tensor([3])}, {"w": torch.tensor([3.0])}, dense={"v": torch.tensor([8.0, 9.0])})
    for order in ((a, b, c), (c, a, b), (b, c, a)):
        states = [before]
        for delta in order:
            delta.apply(model, stack=True)
            states.append(snapshot(model))
        for delta in reversed(order):
            assert snapshot(model) == states.pop()
            delta.revert(model)
        assert snapshot(model) == before


def test_a_delta_trained_on_top_of_another_stacks_on_it():
    model = Bag({"w": torch.zeros(6)})
    a = single(model, 1, 1.0)
    a.apply(model)
    b = single(model, 1, 2.0)  # its base is the model with a on it
    b.apply(model, stack=True)
    assert model.w[1] == 2.0
    b.revert(model)
    a.revert(model)
    with pytest.raises(BaseMismatchError):
        b.apply(model)


def test_applied_reverts_also_after_an_error():
    model, delta = small()
    before = snapshot(model)
    with delta.applied(model) as same:
        assert same is model
        assert snapshot(model) != before
    assert snapshot(model) == before
    with pytest.raises(Planted), delta.applied(model):
        raise Planted
    assert snapshot(model) == before


def test_revert_is_refused_when_the_weights_moved_meanwhile():
    model = Bag({"w": torch.zeros(6)})
    delta = single(model, 1, 1.0, old_values=True)
    delta.apply(model)
    with torch.no_grad():
        model.w[1] = 1.5
    moved = snapshot(model)
    with pytest.raises(DeltaStateError, match=r'"w" has other values'):
        delta.revert(model)
    model.to(torch.bfloat16)
    with pytest.raises(DeltaStateError, match="another shape or dtype"):
        delta.revert(model)
    assert snapshot(model) != moved


def test_loading_the_base_again_forgets_what_was_applied():
    model = Bag({"w": torch.zeros(6)})
    state = copy.deepcopy(model.state_dict())
    delta = single(model, 1, 1.0)
    delta.apply(model)
    model.load_state_dict(state)
    delta.apply(model)
    delta.revert(model)
    assert not model.w.any()


def test_merge_is_apply_and_forget():
    model, delta = small()
    before = snapshot(model)
    delta.merge(model)
    merged = snapshot(model)
    assert merged != before
    with pytest.raises(BaseMismatchError, match="holds this delta's values already"):
        delta.apply(model)
    with pytest.raises(BaseMismatchError):
        delta.merge(model)
    assert snapshot(model) == merged
    delta.revert(model)  # it carries the old values
    assert snapshot(model) == before
    delta.apply(model)
    delta.merge(model)
    assert snapshot(model) == merged
    delta.apply(copy.deepcopy(small()[0]))


def test_a_merged_delta_without_old_values_cannot_be_reverted():
    model = Bag({"w": torch.zeros(6)})
    delta = single(model, 1, 1.0)
    delta.merge(model)
    with pytest.raises(DeltaStateError, match="old_values=True"):
        delta.revert(model)


def test_nothing_happens_under_a_tuner():
    model, delta = small()
    model.register_parameter("selectune_values", nn.Parameter(torch.zeros(4)))
    before = snapshot(model)
    for act in (delta.apply, delta.revert, delta.merge, delta.verify):
        with pytest.raises(DeltaStateError, match="detach"):
            act(model)
    assert snapshot(model) == before
    assert base_info(model) == base_info(small()[0])  # the tuner's vector is no part of the structure


def test_writing_keeps_what_the_tensors_are():
    model, delta = small()
    parameters = {name: (p, p.data_ptr(), p.requires_grad, p.stride()) for name, p in model.named_parameters()}
    delta.apply(model)
    for name, p in model.named_parameters():
        assert (p, p.data_ptr(), p.requires_grad, p.stride()) == parameters[name]


def test_autograd_notices_the_write():
    model = Bag({"w": torch.ones(6)})
    delta = single(model, 1, 2.0)
    x = torch.ones(6, requires_grad=True)
    loss = (x * model.w).sum()
    delta.apply(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_expanded_and_meta_parameters_are_refused():
    model = Bag({"w": torch.zeros(1)})
    wide = Bag({"w": torch.zeros(1).expand(4)})
    delta = make_delta(Bag({"w": torch.zeros(4)}), {"w": torch.tensor([1])}, {"w": torch.ones(1)})
    with pytest.raises(BaseMismatchError, match="share memory"):
        delta.apply(wide)
    with pytest.raises(DeltaStateError, match="meta"):
        delta.apply(model.to("meta"))


# --- verify ---


def test_verify_counts_and_leaves_no_trace():
    model, delta = small()
    before = snapshot(model)
    report = delta.verify(model)
    assert report.ok
    assert (report.base, report.weights, report.changed, report.selected, report.budget) == (True, None, 4, 4, 4)
    assert (report.dense, report.reverted, report.problem) == (4, True, None)
    assert snapshot(model) == before


def test_verify_counts_bits_that_differ():
    model = Bag({"w": torch.zeros(6)})
    delta = make_delta(model, {"w": torch.tensor([0, 1, 2])}, {"w": torch.tensor([0.0, -0.0, 1.0])})
    assert delta.verify(model).changed == 2


def test_verify_reports_a_wrong_base():
    model, delta = small()
    with torch.no_grad():
        model.layer.weight[0, 1] += 1
    before = snapshot(model)
    report = delta.verify(model)
    assert not report.ok
    assert not report.base
    assert '"layer.weight"' in str(report.problem)
    assert snapshot(model) == before


def test_full_checks_see_weights_that_the_delta_does_not_write():
    model = Bag({"w": torch.zeros(6), "v": torch.zeros(2)})
    delta = single(model, 1, 1.0, base=base_info(model, full=True))
    plain = single(model, 1, 1.0)
    delta.apply(model, full=True)
    delta.revert(model)
    assert delta.verify(model, full=True).ok
    with torch.no_grad():
        model.v[0] = 1e-45
    before = snapshot(model)
    report = delta.verify(model, full=True)
    assert (report.ok, report.base, report.weights) == (False, True, False)
    with pytest.raises(BaseMismatchError, match="some weight differs"):
        delta.apply(model, full=True)
    for call in (plain.verify, plain.apply):
        with pytest.raises(DeltaStateError, match="no digest of all weights"):
            call(model, full=True)
    assert snapshot(model) == before


def test_verify_notices_a_write_outside_the_support(monkeypatch):
    model = Bag({"w": torch.zeros(6)})
    delta = single(model, 1, 1.0)

    def sloppy(tensor, indices, values):
        tensor.detach().view(-1)[indices] = values
        tensor.detach().view(-1)[5] = 3.0

    monkeypatch.setattr(bits, "scatter", sloppy)
    with pytest.raises(IntegrityError):
        delta.verify(model)


# --- bits, not numbers ---


def test_a_sign_of_zero_is_a_change():
    model = Bag({"w": torch.zeros(6)}, {"b": torch.zeros(2)})
    delta = make_delta(model, {"w": torch.tensor([1])}, {"w": torch.tensor([-0.0])}, old_values=True)
    delta.merge(model)
    with torch.no_grad():
        model.w[1] = 0.0
    with pytest.raises(DeltaStateError, match="does not hold"):
        delta.revert(model)
    tuned = copy.deepcopy(model)
    tuned.b[0] = -0.0
    assert [entry.name for entry in diff(model, tuned).dense] == ["b"]


def test_a_nan_that_stayed_is_no_change():
    model = Bag({"w": torch.full((2,), float("nan"))}, {"b": torch.full((2,), float("nan"))})
    delta = diff(model, copy.deepcopy(model))
    assert not delta.patches
    assert not delta.dense
