"""Scopes: what patterns find, ties, padding rows, and every refusal's sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import selectune as st
from selectune.errors import ScopeError


def names(model, **patterns):
    found = st.Scope(**patterns).find(model)
    return [t.name for t in found.tensors], [t.name for t in found.whole]


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))


def test_patterns(net):
    assert names(net)[0] == [n for n, _ in net.named_parameters()]
    assert names(net, include="*.bias")[0] == ["0.bias", "1.bias", "2.bias"]
    assert names(net, exclude=["1.*", "*.bias"])[0] == ["0.weight", "2.weight"]
    assert names(net, exclude="0.*", train_fully="2.*") == (["1.weight", "1.bias"], ["2.weight", "2.bias"])


def test_what_was_frozen_or_is_no_float_stays_out(net):
    net[0].weight.requires_grad_(False)
    net.register_parameter("ids", nn.Parameter(torch.arange(3), requires_grad=False))
    assert "0.weight" not in names(net)[0]
    assert "ids" not in names(net)[0]


def test_tied_tensors_count_once_under_their_first_name():
    model = nn.ModuleDict({"a": nn.Embedding(5, 3), "b": nn.Linear(3, 5, bias=False)})
    model["b"].weight = model["a"].weight
    found = st.Scope().find(model)
    assert [t.names for t in found.tensors] == [("a.weight", "b.weight")]
    assert names(model, include="b.*")[0] == ["a.weight"]
    assert found.eligible == 15


def test_padding_rows_get_no_gradient_and_no_budget():
    model = nn.ModuleDict({"a": nn.Embedding(5, 3, padding_idx=1)})
    found = st.Scope().find(model)
    assert (found.eligible, list(found.tensors[0].padding)) == (12, [3, 4, 5])
    tuner = st.attach(model, st.random(12))
    assert tuner.support["a.weight"].tolist() == [0, 1, 2, *range(6, 15)]


def test_a_scope_that_matches_nothing(net):
    with pytest.raises(
        ScopeError, match=r"pattern 'decoder.\*' matches no parameter of Sequential.*named like: 0.weight"
    ):
        st.attach(net, st.pafi(3, scope="decoder.*"))
    with pytest.raises(ScopeError, match="leaves no trainable floating tensor"):
        st.attach(net, st.pafi(3, scope=st.Scope(exclude="*")))
    with pytest.raises(ScopeError, match="no bias vectors, so BitFit has nothing to train"):
        st.attach(nn.Linear(2, 2, bias=False), st.bitfit())
    with pytest.raises(ScopeError, match="patterns on parameter names, got 3"):
        st.Scope(include=[3])  # pyright: ignore[reportArgumentType]
    assert all(p.requires_grad for p in net.parameters())


def test_bitfit_counts_true_biases_only(net):
    tuner = st.attach(net, st.bitfit())
    assert (tuner.budget, tuner.selected, list(tuner.support)) == (6, 6, ["0.bias", "1.bias", "2.bias"])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Parameter(torch.empty(3, device="meta")), "meta device"),
        (lambda: nn.Parameter(torch.eye(3).to_sparse()), "strided"),
        (lambda: nn.Parameter(torch.zeros(1).expand(3)), "expanded"),
    ],
)
def test_tensors_that_cannot_be_written_in_place(make, why):
    model = nn.Module()
    model.register_parameter("odd", make())
    with pytest.raises(ScopeError, match=f'"odd" cannot be trained in place: .*{why}'):
        st.attach(model, st.pafi(1))


def test_a_table_that_rewrites_itself_in_forward():
    model = nn.ModuleDict({"table": nn.Embedding(5, 3, max_norm=1.0), "head": nn.Linear(3, 2)})
    with pytest.raises(ScopeError, match=r'"table.weight" belongs to an Embedding with max_norm=1.0'):
        st.attach(model, st.pafi(1))
    assert st.attach(model, st.pafi(1, scope="head.*")).selected == 1


def test_memory_shared_by_two_parameters():
    model = nn.Module()
    memory = torch.zeros(6)
    model.a, model.b = nn.Parameter(memory[:4]), nn.Parameter(memory[3:])
    with pytest.raises(ScopeError, match='"a" and "b" share memory'):
        st.attach(model, st.pafi(1))
    model.b = nn.Parameter(memory[4:])
    assert st.attach(model, st.pafi(1)).selected == 1


@pytest.mark.parametrize("recipe", [st.full, st.xattn])
def test_whole_recipes_take_a_scope_as_others_do(recipe, net):
    """What it includes and what it trains wholly, without what it excludes."""
    scope = st.Scope(include=["0.*", "1.*"], exclude="*.bias", train_fully="2.*")
    tuner = st.attach(net, recipe(scope))
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["0.weight", "1.weight", "2.weight"]
    tuner.detach()
    st.attach(net, recipe(scope=st.Scope(include="0.*")))
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]


def test_an_exclude_that_matches_nothing_is_told(caplog):
    model = nn.Sequential(nn.Linear(2, 2))
    with caplog.at_level("WARNING", logger="selectune"):
        st.Scope(exclude="*bias").find(model)
        assert not caplog.records
        assert st.Scope(exclude=("*embedings*", "*bias")).find(model).eligible == 4
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "exclude: '*embedings*' matches no parameter"
    ]
