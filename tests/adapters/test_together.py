"""Adapters of different seeds on one model: each delta gives its own run's outputs, and the base comes back."""

from __future__ import annotations

import os
import random

import pytest
import torch
from adapters_kit import classifier, trace
from test_rebuild import logits, trained

import selectune as st
from selectune.adapters import put_on, together
from selectune.errors import BaseMismatchError, ConfigError

MANY = int(os.environ.get("SWITCHES", 120))
"""The long form has 1,000."""


@pytest.mark.parametrize(("method", "switches"), [(st.full(), MANY), (st.id3(60, steps=4), 60)], ids=["full", "id3"])
def test_many_switches_between_seeds(method, switches):
    """Two LoRA deltas of different seeds on one base, trained whole or selected from."""
    pytest.importorskip("peft")
    runs = {pair: trained("lora:r=2", method, seed=seed) for pair, seed in (("de-en", 5), ("fr-en", 6))}
    said = {pair: output for pair, (_, output) in runs.items()}
    assert not torch.equal(said["de-en"], said["fr-en"])
    model = classifier()
    before, plain = trace(model), logits(classifier())
    adapted, deltas = together(model, {pair: delta for pair, (delta, _) in runs.items()})
    drawn = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    assert torch.equal(logits(adapted.model), plain)
    shelf = st.Shelf(adapted.model, deltas)
    order = random.Random(0)
    for count in range(switches):
        pair = order.choice([None, "de-en", "fr-en"])
        st.switch(adapted.model, pair)
        if count % 30 == 0:
            assert torch.equal(logits(adapted.model), plain if pair is None else said[pair]), (count, pair)
    st.switch(adapted.model, None)
    assert all(torch.equal(tensor, drawn[name]) for name, tensor in adapted.model.state_dict().items())
    del shelf
    adapted.remove()
    assert trace(model) == before


@pytest.mark.parametrize("kind", ["pfeiffer", "prompt:tokens=4", "hadamard"])
def test_other_kinds(kind):
    if "prompt" in kind:
        pytest.importorskip("peft")
    runs = [trained(kind, st.id3(40, steps=4), seed=seed) for seed in (1, 2)]
    adapted, deltas = together(classifier(), {str(number): delta for number, (delta, _) in enumerate(runs)})
    for number, (_, said) in enumerate(runs):
        again = st.Delta.from_bytes(deltas[str(number)].to_bytes())
        assert again.verify(adapted.model).ok
        with again.applied(adapted.model):
            assert torch.equal(logits(adapted.model), said)


def test_what_does_not_go_together_is_refused():
    one, _ = trained("pfeiffer:reduction=4", st.id3(40, steps=4))
    other, _ = trained("pfeiffer:reduction=8", st.id3(40, steps=4))
    model = classifier()
    before = trace(model)
    with pytest.raises(ConfigError, match=r"'b' was trained on pfeiffer:.*reduction=8.*of one kind with equal options"):
        together(model, {"a": one, "b": other})
    tuner = st.attach(model, st.pafi(5))
    on_the_base = tuner.delta(allow_empty=True)
    tuner.detach()
    before = trace(model)
    for given in ({"a": one, "b": on_the_base}, {"a": on_the_base, "b": on_the_base}):
        with pytest.raises(ConfigError, match="the base itself"):
            together(model, given)
    with pytest.raises(ConfigError, match="there is no delta"):
        together(model, {})
    wrong = classifier(seed=1)
    with pytest.raises(BaseMismatchError):
        together(wrong, {"a": one})
    assert trace(model) == before
    assert put_on(model, "pfeiffer").on  # nothing was left on it
