"""Runs on quantised bases: the option, the record in the delta, and the base that is quantised again from it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from quant_kit import Rows8
from torch import nn

import selectune as st
from selectune.errors import ConfigError, DeltaError
from selectune.integrations.quantise import QUANTISED, by_layer, bytes_saved, quantise
from selectune.interop import bridges
from selectune.models.recorded import NONE, task_on
from selectune.models.restore import Source, evaluate_delta, merge_delta, verify_delta
from selectune.runs.config import RunConfig
from selectune.runs.resume import settings_of
from selectune.runs.training import run
from selectune.study.cells import Cell

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def config(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setitem(QUANTISED, "own", by_layer(lambda: Rows8))
    return RunConfig(
        model=str(tiny), task="glue/rte", budget=200, max_steps=4, batch_size=8, lr=5e-3, data=str(data),
        out=str(tmp_path / "out"), seed=1, quantise="own", save_every=2,
    )  # fmt: skip


def test_a_run_is_found_again_on_the_base_that_is_quantised_anew(config, tiny, tmp_path):
    found = run(config)
    delta, source = st.load(found.delta), Source(str(tiny))
    assert delta.beside
    assert delta.info["method"]["quantise"] == "own"
    assert verify_delta(source, found.delta).ok
    assert evaluate_delta(source, found.delta, task_on(None, found.delta, NONE), config.data) == found.evaluation
    model = st.load_model(found.delta)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {Rows8, nn.Linear}  # the head that is drawn for the task stays as it is
    with pytest.raises(DeltaError, match="beside quantised weights"):
        merge_delta(source, found.delta, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_it_is_written_as_a_plain_model(config, tiny, tmp_path):
    found, source = run(config), Source(str(tiny))
    told = bridges.export("dequantised", source, found.delta, tmp_path / "plain", task_on(None, found.delta, NONE))
    trained = st.load_model(found.delta)
    quantised = [m for m in trained.modules() if isinstance(m, Rows8)]
    assert told["dequantised"] == len(quantised) > 0
    plain = type(trained).from_pretrained(tmp_path / "plain").eval()
    assert not any(isinstance(module, Rows8) for module in plain.modules())
    ids = torch.arange(4, 12).view(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, trained(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    for kind in ("merged", "peft", "vllm"):
        with pytest.raises(DeltaError, match=f"cannot be exported as {kind}.*selectune export dequantised"):
            bridges.export(kind, source, found.delta, tmp_path / kind)
        assert not (tmp_path / kind).exists()
    ordinary = run(dataclasses.replace(config, quantise=None, out=str(tmp_path / "ordinary")))
    with pytest.raises(ConfigError, match="base is not quantised"):
        bridges.export("dequantised", source, ordinary.delta, tmp_path / "other")


def test_a_resumed_run_has_the_bytes_of_one_without_a_stop(config, tmp_path):
    whole = run(config)
    part = dataclasses.replace(config, out=str(tmp_path / "part"))
    run(part)
    (tmp_path / "part" / "delta.safetensors").unlink()
    again = run(part, resume=tmp_path / "part" / "checkpoint-2")
    assert again.delta.read_bytes() == whole.delta.read_bytes()


def test_runs_without_it_keep_their_records_and_keys(config):
    plain = dataclasses.replace(config, quantise=None)
    assert "quantise" not in settings_of(plain)
    assert settings_of(config)["quantise"] == "own"
    settings = {"model": "demo", "task": "glue/rte", "budget": 1000}
    assert Cell("main", settings).key != Cell("main", {**settings, "quantise": "own"}).key
    with pytest.raises(ConfigError, match="Unknown quantise 'int3'"):
        dataclasses.replace(config, quantise="int3")


def test_only_linear_layers_with_weights_of_their_own_are_quantised(monkeypatch):
    monkeypatch.setitem(QUANTISED, "own", by_layer(lambda: Rows8))
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False), nn.Linear(8, 3))
    model[2].weight = model[0].weight
    assert quantise(model, "own", keep=["3.weight"]) == 1
    assert [type(layer) for layer in model] == [nn.Embedding, Rows8, nn.Linear, nn.Linear]
    with pytest.raises(ConfigError, match="Unknown quantisation"):
        quantise(model, "int3")
    assert bytes_saved(nn.Sequential(nn.Linear(64, 64)), "int8") == 4 * 64 * 64 - 64 * 64 - 5 * 64


def test_a_base_is_quantised_once_and_before_anything_is_on_it(monkeypatch):
    monkeypatch.setitem(QUANTISED, "own", by_layer(lambda: Rows8))
    make = lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))  # noqa: E731
    model = make()
    quantise(model, "own")
    with pytest.raises(ConfigError, match=r"2 weights of the model are quantised already \(tests\.rows8\)"):
        quantise(model, "own")
    tuner = st.attach(model := make(), st.random(budget=5))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=1)
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    delta = tuner.delta()
    with pytest.raises(ConfigError, match=r"carries a tuner\. Quantise the base first"):
        quantise(model, "own")
    tuner.detach()
    delta.apply(model)
    with pytest.raises(ConfigError, match="carries a delta"):
        quantise(model, "own")
    delta.revert(model)
    assert quantise(model, "own") == 2


def test_a_model_with_a_quantised_base_is_never_written_as_an_ordinary_one(config, tiny, tmp_path):
    """Also where no offset lies beside a quantised weight."""
    config = dataclasses.replace(config, include=("*LayerNorm*",), budget=20)
    found, source = run(config), Source(str(tiny))
    assert not st.load(found.delta).beside
    with pytest.raises(DeltaError, match=r"The base of .* is quantised"):
        merge_delta(source, found.delta, tmp_path / "merged")
    with pytest.raises(DeltaError, match=r"The base of .* is quantised"):
        bridges.export("merged", source, found.delta, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert bridges.export("dequantised", source, found.delta, tmp_path / "plain")["dequantised"] > 0


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_kinds_of_the_libraries(kind):
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[kind], reason="the extra quant is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)).eval()
    x, before = torch.randn(5, 64), 4 * 2 * 64 * 128
    wanted = model(x)
    assert quantise(model, kind) == 2
    weights = st.Scope(exclude="*bias").find(model).tensors
    stored = sum(tensor.quantised.nbytes for tensor in weights if tensor.quantised is not None)
    assert stored < before / (3.7 if kind == "int8" else 6)
    assert model[0].bias.requires_grad
    with torch.no_grad():  # in eval mode, where bitsandbytes would store weights anew on some processors
        assert float((model(x) - wanted).norm() / wanted.norm()) < (0.02 if kind == "int8" else 0.2)
    tuner = st.attach(model, st.id3(budget=50, steps=2))
    model(x).sum().backward()
    assert tuner.verify().selected == 25
    tuner.detach()
