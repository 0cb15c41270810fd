"""RoSA: LoRA and entries of the base in one budget, saved and put on a plain base again."""

from __future__ import annotations

import pytest
import torch
from adapters_kit import classifier, trace
from test_rebuild import BATCH, logits

import selectune as st
from selectune.adapters import put_on, rebuild
from selectune.delta import Delta
from selectune.errors import BudgetError, ScopeError

pytest.importorskip("peft")
DATA = {"calibration": [BATCH], "loss": lambda model, batch: model(**batch).loss}


def test_one_budget_for_lora_and_the_base():
    adapted = put_on(classifier(), "lora:r=1", 5, freeze=False)
    tuner = st.attach(adapted.model, st.rosa(adapted.size + 50), **DATA)
    assert (tuner.budget, tuner.selected, tuner.trained) == (50, 50, adapted.size + 50)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for _ in range(3):
        adapted.model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    delta, said = Delta.from_bytes(tuner.delta().to_bytes()), logits(adapted.model)
    tuner.detach()
    assert all(name.endswith("base_layer.weight") or "lora" not in name for name in delta.support)
    assert {dense.name for dense in delta.dense} == set(adapted.names)
    model = classifier()
    before = trace(model)
    again = rebuild(model, delta)
    assert delta.verify(again.model, full=True).ok
    with delta.applied(again.model):
        assert torch.equal(logits(again.model), said)
    again.remove()
    assert trace(model) == before


def test_the_entries_are_those_with_the_largest_squared_gradients_of_each_matrix():
    adapted = put_on(classifier(), "lora:r=1", 5, freeze=False)
    name = "bert.encoder.layer.1.attention.self.value.base_layer.weight"
    tuner = st.attach(adapted.model, st.rosa(adapted.size + 7, scope=name), **DATA)
    (found,) = tuner.support.values()
    tuner.detach()
    adapted.model(**BATCH).loss.backward()
    squares = dict(adapted.model.named_parameters())[name].grad.square().reshape(-1)
    assert set(found.tolist()) == set(squares.topk(7).indices.tolist())


def test_a_density_is_of_both_together():
    adapted = put_on(classifier(), "lora:r=1", 5, freeze=False)
    method = st.rosa(0.5)
    eligible = method.scope.find(adapted.model).eligible
    tuner = st.attach(adapted.model, method, **DATA)
    assert tuner.trained == round(0.5 * (eligible + adapted.size))


def test_what_goes_wrong_is_said():
    adapted = put_on(classifier(), "lora:r=1", 5, freeze=False)
    with pytest.raises(BudgetError, match=rf"the {adapted.size} of \*lora_\* too, .* none is left to select"):
        st.attach(adapted.model, st.rosa(adapted.size), **DATA)
    frozen = put_on(classifier(), "lora:r=1", 5)
    with pytest.raises(BudgetError, match="freeze=False"):
        st.attach(frozen.model, st.rosa(5000), **DATA)
    with pytest.raises(ScopeError, match="Put LoRA on the model first"):
        st.attach(classifier(), st.rosa(5000), **DATA)
