"""A delta that stores a fresh head whole fits a model with any head there; everything else must be the base's."""

from __future__ import annotations

import pytest
import torch
from delta_kit import snapshot
from test_delta_wrong_base import CLASSES, Tiny, one_ulp, replaced, trained
from torch import nn

from selectune.delta import Delta, Dense, Shelf, base_info, diff, switch, weights_digest
from selectune.delta.combine import algebra
from selectune.errors import BaseMismatchError, DeltaError

HEAD = ("head.bias", "head.weight")


def fresh_delta(seed: int, full: bool = False, tensors: tuple[str, ...] | None = None, old_values=False) -> Delta:
    """The plain delta of delta_kit, with the head stored whole."""
    base = Tiny()
    tuned = trained(base, seed, None if tensors is None else (*tensors, *HEAD))
    found = diff(base, tuned, old_values=old_values)
    dense = [
        Dense.make(name, "parameter", tuned.get_parameter(name), base.get_parameter(name), old_values=old_values)
        for name in HEAD
    ]
    info = {**found.info, "base": base_info(base, id="tiny", revision="1", initialised=HEAD, full=full)}
    patches = [patch for patch in found.patches if patch.name not in HEAD]
    return Delta(patches, dense, {**info, "selected": sum(patch.indices.numel() for patch in patches)})


WRONG = {name: make for name, make in CLASSES.items() if name != "other seed of the head"}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_base_is_refused(make, message, full):
    for i in range(20):
        delta = fresh_delta(i, full)
        model = make(delta, i)
        before = snapshot(model)
        with pytest.raises(BaseMismatchError):
            delta.apply(model, full=full)
        with pytest.raises(BaseMismatchError):
            delta.merge(model)
        assert not delta.verify(model, full=full).ok
        assert snapshot(model) == before


def other_beside(delta, i):
    """Another delta whose scalars this one does not write lies merged on the model."""
    model = Tiny(head_seed=i)
    diff(Tiny(), trained(Tiny(), i, ("layers.1.weight", "wide.bias"))).merge(model)
    return model


BEYOND = {  # the two classes that the places a delta writes do not show
    "1 ulp in an unselected weight": lambda d, i: one_ulp(Tiny(head_seed=i), "layers.1.weight", i),
    "another delta, disjoint": other_beside,
}


@pytest.mark.parametrize("make", BEYOND.values(), ids=BEYOND.keys())
def test_the_digest_of_all_weights_sees_the_rest(make):
    for i in range(20):
        delta = fresh_delta(i, full=True, tensors=("layers.0.weight",))
        model = make(delta, i)
        before = snapshot(model)
        with pytest.raises(BaseMismatchError, match="some weight differs"):
            delta.apply(model, full=True)
        report = delta.verify(model, full=True)
        assert (report.base, report.weights, report.ok) == (True, False, False)
        assert snapshot(model) == before
        with delta.applied(model):
            pass
        assert snapshot(model) == before


@pytest.mark.parametrize("full", [False, True])
def test_another_head_is_taken_and_given_back(full):
    for i in range(20):
        delta, model = fresh_delta(i, full=True), Tiny(head_seed=i + 1)
        before = snapshot(model)
        assert delta.verify(model, full=full).ok
        delta.apply(model, full=full)
        assert snapshot(model) == snapshot(trained(Tiny(), i))
        delta.revert(model)
        assert snapshot(model) == before


def test_a_head_of_other_labels_is_refused():
    with pytest.raises(BaseMismatchError, match="number of labels"):
        fresh_delta(0).apply(Tiny(labels=5))


def test_only_what_is_named_and_whole_may_differ():
    """The bias is not named, and the weight is named but not stored whole: both must match."""
    base, delta = Tiny(), fresh_delta(1)
    bias_named = {**delta.info, "base": base_info(base, initialised=["head.weight"])}
    model = one_ulp(Tiny(), "head.bias", 0)
    with pytest.raises(BaseMismatchError, match=r'"head\.bias" differs'):
        Delta(delta.patches, delta.dense, bias_named).apply(model)
    bias_only = Delta(delta.patches, [entry for entry in delta.dense if entry.name == "head.bias"], delta.info)
    bias_only.apply(model)
    bias_only.revert(model)
    with pytest.raises(BaseMismatchError, match=r'"head\.weight" was initialised otherwise.*no seed is recorded'):
        bias_only.apply(one_ulp(Tiny(), "head.weight", 0))


def test_a_fresh_tensor_that_is_tied_is_left_out_under_all_its_names():
    one, other = Tiny(), Tiny()
    with torch.no_grad():
        other.out.weight.add_(1.0)
    assert weights_digest(one) != weights_digest(other)
    assert weights_digest(one, ["out.weight"]) == weights_digest(other, ["embed.weight"])
    tuned = trained(one, 3)
    weight = Dense.make("embed.weight", "parameter", tuned.embed.weight, one.embed.weight)
    delta = Delta([], [weight], {"base": base_info(one, initialised=["out.weight"], full=True)})
    before = snapshot(other)
    delta.apply(other, full=True)
    assert torch.equal(other.out.weight, tuned.embed.weight)
    delta.revert(other)
    assert snapshot(other) == before


def test_an_older_digest_is_over_all_tensors():
    delta = fresh_delta(2)
    info = {**delta.info, "base": {**delta.info["base"], "weights": weights_digest(Tiny())}}
    old = Delta(delta.patches, delta.dense, info)
    with pytest.raises(BaseMismatchError, match="some weight differs"):
        old.apply(Tiny(head_seed=1), full=True)
    old.apply(Tiny(head_seed=1))
    old.apply(Tiny(), full=True)


def test_on_a_shelf():
    model = Tiny(head_seed=9)
    before = snapshot(model)
    shelf = Shelf(model, {"a": fresh_delta(1), "b": fresh_delta(2)})
    for name, seed in [("a", 1), ("b", 2), ("a", 1), ("b", 2)]:
        switch(model, name)
        assert snapshot(model) == snapshot(trained(Tiny(), seed))
    switch(model, None)
    assert snapshot(model) == before
    del shelf


def test_arithmetic_needs_the_head_that_was_trained():
    """The difference from another random head would be wrong, so arithmetic refuses it."""
    a, b = fresh_delta(1, full=True), fresh_delta(2, full=True)
    with pytest.raises(BaseMismatchError, match=r'"head\.weight" was initialised otherwise|"head\.weight" differs'):
        algebra.scale(a, 0.5, base=Tiny(head_seed=4))
    summed = algebra.add([a, b], base=Tiny())
    assert summed.info["base"]["weights"] == a.info["base"]["weights"]
    summed.apply(Tiny(head_seed=4), full=True)
    kept = fresh_delta(1, old_values=True)
    model = Tiny(head_seed=4)
    before = snapshot(model)
    with algebra.scale(kept, 1.0).applied(model):
        assert snapshot(model) == snapshot(trained(Tiny(), 1))
    assert snapshot(model) == before


def test_digests_over_other_tensors_are_not_compared():
    base, a = Tiny(), fresh_delta(1, full=True)
    plain = diff(base, trained(base, 2, ("wide.weight",)))
    b = Delta(plain.patches, [], {**plain.info, "base": base_info(base, id="tiny", revision="1", full=True)})
    assert a.info["base"]["weights"] != b.info["base"]["weights"]
    both = algebra.add([b, a], base=base)
    assert both.info["base"]["weights"] == a.info["base"]["weights"]
    both.apply(Tiny(), full=True)
    other = {**b.info, "base": {**b.info["base"], "weights": "0" * 64}}
    with pytest.raises(DeltaError, match="different digests"):
        algebra.add([b, Delta(b.patches, [], other)], base=base)


def test_a_model_without_a_mark_says_nothing():
    """transformers marks what it loads; without one mark nothing is known, and nothing guessed."""
    model = Tiny()
    assert base_info(model)["initialised"] == []
    for name, parameter in model.named_parameters():
        if name not in HEAD:
            parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    assert [row["name"] for row in base_info(model)["initialised"]] == list(HEAD)
    assert base_info(model, initialised=())["initialised"] == []
    replaced(model, "wide", nn.Linear(6, 4))
    assert [row["name"] for row in base_info(model)["initialised"]] == [*HEAD, "wide.bias", "wide.weight"]
