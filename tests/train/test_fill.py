"""fill="zero": what is not selected is 0 from attach to detach, and the base comes back bit for bit."""

from __future__ import annotations

import logging

import pytest
import torch
from train_kit import Mixed, bits, mixed_loss, same, steps, tokens

import selectune as st
from selectune.errors import CalibrationError, ConfigError, IntegrityError
from selectune.schedule import Increment, OneShot, Repeat


def mixed(dtype=torch.float32):
    torch.manual_seed(0)
    return Mixed(dtype)


def attach(model, method=None, **arguments):
    return st.attach(model, method or st.sparse_adapter(60), calibration=[tokens(0)], loss=mixed_loss, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_stay_zero_under_decay_and_momentum(dtype):
    model = mixed(dtype)
    base = bits(model)
    tuner = attach(model)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in steps(model, optimizer, 5):
        for name, weight in model.named_parameters():
            if "selectune_values" not in name:
                listed = tuner.support.get(name, torch.empty(0, dtype=torch.int64))
                rest = torch.ones(weight.numel(), dtype=torch.bool)
                rest[listed] = False
                assert not bool(bits(model)[name][rest].any())
    found = tuner.verify()
    assert 40 < found.changed <= found.selected == 60
    assert found.zeroed == sum(p.numel() for p in mixed().parameters()) - 60
    assert tuner.delta().info["method"]["fill"] == "zero"
    tuner.detach()
    assert same(bits(model), base)


def test_the_forward_pass_sees_the_zeros():
    model = mixed()
    tuner = attach(model)
    twin = mixed()
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            kept = torch.zeros(weight.numel())
            kept[tuner.support.get(name, torch.empty(0, dtype=torch.int64))] = 1
            weight.copy_(torch.where(kept.view(weight.shape) > 0, weight, 0))
    assert torch.equal(model(tokens(1)), twin(tokens(1)))


def test_a_checkpoint_of_the_run_loads_and_the_base_does_not():
    model = mixed()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    tuner = attach(model)
    for _ in steps(model, torch.optim.SGD(tuner.parameters(), lr=0.1), 2):
        pass
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict(state)
    tuner.verify()
    with pytest.raises(IntegrityError, match=r"changed .* tensors outside the support"):
        model.load_state_dict(base)


def test_verify_sees_a_zero_that_moved():
    model = mixed()
    tuner = attach(model)
    chosen = set(tuner.support["linear.weight"].tolist()) if "linear.weight" in tuner.support else set()
    at = next(i for i in range(64) if i not in chosen)
    with torch.no_grad():
        model.linear.weight.view(-1)[at] = -0.0
    with pytest.raises(IntegrityError, match=r"linear\.weight"):
        tuner.verify()


def test_a_fill_that_cannot_be_is_refused_before_anything_changes():
    with pytest.raises(ConfigError, match=r"Unknown fill 'one'\. Known: keep, zero"):
        st.Method(score=st.scores.magnitude(), schedule=OneShot(5), fill="one")
    with pytest.raises(ConfigError, match="must not read what a step brings; got d3"):
        st.Method(score=st.scores.d3(), schedule=OneShot(5), fill="zero")
    with pytest.raises(ConfigError, match="got no score"):
        st.Method(scope=st.Scope(train_fully="*"), fill="zero")
    model = mixed()
    base = bits(model)
    for schedule, count in ((Increment(6, 3), 2), (Repeat(6, 3), 6)):
        with pytest.raises(ConfigError, match=f"needs the whole budget selected at attach.*selects {count} of 6"):
            st.attach(model, st.Method(score=st.scores.magnitude(), schedule=schedule, fill="zero"))
    assert same(bits(model), base)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "d3"}, r"Unknown score 'd3'\. Known: snip, grasp"),
        ({"score": "magnitude", "batches": 2}, "'magnitude' takes no batches"),
        ({"score": "snip", "temperature": 2.0}, "'snip' takes no temperature"),
        ({"batches": 0}, "batches= must be an int"),
    ],
)
def test_options_that_do_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        st.sparse_adapter(**options)


@pytest.mark.parametrize(("init", "score"), [("zero", "snip"), ("normal", "snip"), ("normal", "magnitude")])
def test_an_adapter_whose_up_projection_starts_at_zero(init, score, caplog):
    """For SparseAdapter neither the zeros nor the weights before them tie, so both projections are selected from."""
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertForSequenceClassification

    from selectune.adapters import put_on

    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40)
    adapted = put_on(BertForSequenceClassification(config).eval(), f"pfeiffer:reduction=2,init={init}", 3)
    ids = torch.arange(3, 15).view(2, 6)
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1])}

    def attach(method):
        return st.attach(adapted.model, method, calibration=[batch], loss=lambda model, b: model(**b).loss)

    if init == "zero" and score == "snip":
        with pytest.raises(CalibrationError, match="or every score is 0"):
            attach(st.snip(60))
    base = bits(adapted.model)
    with caplog.at_level(logging.WARNING, logger="selectune"):
        tuner = attach(st.sparse_adapter(60, score))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in tuner.support} == {"down", "up"}
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for _ in range(3):
        adapted.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.verify().changed > 30
    tuner.detach()
    assert same(bits(adapted.model), base)


def test_large_sparse_keeps_as_many_entries():
    """A bottleneck k times as wide with the kept share divided by k: the weights of both projections grow k-fold."""
    kept = []
    for width, budget in ((4, 0.2), (16, 0.05)):
        adapter = torch.nn.Sequential(torch.nn.Linear(8, width, bias=False), torch.nn.Linear(width, 8, bias=False))
        kept.append(st.attach(adapter, st.sparse_adapter(budget, "magnitude")).selected)
    assert kept == [13, 13]
