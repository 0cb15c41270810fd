"""Heads that no checkpoint held, and the digest of all of the base's weights, on models of transformers."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from load_model_kit import (
    HEAD,
    ROWS,
    batch_of,
    bits,
    classifier,
    heads_whole,
    logits_elsewhere,
    logits_of,
    saved,
    trained,
    trunk,
)
from safetensors.torch import load_file, save_file
from torch import nn

import selectune as st
from selectune.delta import base_info, weights_digest
from selectune.errors import BaseMismatchError, ModelError
from selectune.models.restore import Source, evaluate_delta, verify_delta
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.tasks import get

pytest_plugins = ("tiny_fixtures",)


def test_another_random_head_is_accepted_and_comes_back(tmp_path):
    said, path = saved(tmp_path)
    delta = st.load(path)
    assert [row["name"] for row in delta.info["base"]["initialised"]] == HEAD
    other = classifier(tmp_path / "base", seed=77)
    before = bits(other)
    for full in (False, True):
        delta.apply(other, full=full)
        assert logits_of(other) == said
        delta.revert(other)
        assert bits(other) == before
    assert delta.verify(other, full=True).ok
    assert bits(other) == before
    loaded = st.load_model(path)
    delta.revert(loaded)
    assert {n: d for n, d in bits(loaded).items() if n not in HEAD} == {
        n: d for n, d in before.items() if n not in HEAD
    }


def test_the_digest_is_that_of_the_base_at_every_save(tmp_path):
    trunk(tmp_path / "base")
    model = classifier(tmp_path / "base")
    expected = weights_digest(model, HEAD)
    assert expected != weights_digest(model)
    tuner = trained(model, heads_whole(), 1)
    assert tuner.delta().info["base"]["weights"] == expected
    model(**batch_of(model)).loss.backward()
    assert tuner.delta().info["base"]["weights"] == expected
    assert tuner.delta(full=False).info["base"]["weights"] is None
    named = base_info(model, initialised=["classifier.weight"])  # said after training: digests are still the base's
    again = tuner.delta(base=named).info["base"]
    tuner.detach()
    assert again["weights"] == weights_digest(model, ["classifier.weight"])
    assert again["initialised"] == base_info(model, initialised=["classifier.weight"])["initialised"]


@pytest.mark.parametrize("method", ["full", "lt_sft", "repeat_d3", "sparse_adapter"])
def test_the_digest_is_the_base_s_whatever_is_trained(tmp_path, method):
    trunk(tmp_path / "base")
    model = classifier(tmp_path / "base")
    expected = weights_digest(model, HEAD)
    made = {
        "full": lambda: st.full(),
        "lt_sft": lambda: st.lt_sft(budget=50, steps=4, dense=0.5),
        "repeat_d3": lambda: st.repeat_d3(budget=50, steps=4),
        "sparse_adapter": lambda: st.sparse_adapter(budget=50, score="magnitude"),
    }[method]()
    tuner = trained(model, made, 1)
    recorded = tuner.delta(allow_empty=True).info["base"]
    assert recorded["weights"] == expected
    assert {row["name"]: row["digest"] for row in recorded["initialised"]} == {
        name: digest for name, digest in bits(classifier(tmp_path / "base")).items() if name in HEAD
    }


def test_a_head_that_is_not_whole_in_the_delta_is_refused(tmp_path):
    trunk(tmp_path / "base")
    path = trained(classifier(tmp_path / "base"), st.id3(budget=60, steps=3)).save(tmp_path / "run")
    other = classifier(tmp_path / "base", seed=77)
    before = bits(other)
    with pytest.raises(BaseMismatchError, match=r"does not store them whole.*no seed is recorded.*train_fully"):
        st.load(path).apply(other)
    with pytest.raises(BaseMismatchError, match="no seed is recorded"):
        st.load_model(path)
    assert bits(other) == before
    st.load(path).apply(classifier(tmp_path / "base"))  # drawn from the seed of training


def test_a_copy_does_not_know_its_head_but_load_model_does(tmp_path):
    """deepcopy takes transformers' marks away: nothing is guessed, and the refusal says what to do."""
    trunk(tmp_path / "base")
    model = copy.deepcopy(classifier(tmp_path / "base"))
    tuner = trained(model, heads_whole())
    path = tuner.save(tmp_path / "run")
    assert st.load(path).info["base"]["initialised"] == []
    other = classifier(tmp_path / "base", seed=77)
    before = bits(other)
    with pytest.raises(BaseMismatchError, match=r'classifier.weight" comes from no check.*load_model.*initialised='):
        st.load(path).apply(other)
    assert bits(other) == before
    assert logits_elsewhere(path, tmp_path) == logits_of(model)
    named = tuner.delta(base=base_info(model, initialised=HEAD))
    said = logits_of(model)
    named.apply(other, full=True)
    assert logits_of(other) == said


class Own(nn.Module):
    """A module that is none of transformers' around one that is."""

    def __init__(self, folder, seed: int) -> None:
        from transformers import AutoModel

        super().__init__()
        torch.manual_seed(seed)
        self.trunk = AutoModel.from_pretrained(folder)
        self.head = nn.Linear(32, 3)

    def forward(self, rows):
        return self.head(self.trunk(rows).last_hidden_state[:, 0])


def test_a_head_in_a_module_of_one_s_own(tmp_path):
    trunk(tmp_path / "base")
    model = Own(tmp_path / "base", 1)
    tuner = st.attach(model, st.id3(budget=40, steps=1, train_fully=("head.*",)))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    model(torch.tensor(ROWS)).square().sum().backward()
    optimizer.step()
    path = tuner.save(tmp_path / "run")
    delta, said, other = st.load(path), bits(model), Own(tmp_path / "base", 2)
    before = bits(other)
    assert [row["name"] for row in delta.info["base"]["initialised"]] == ["head.bias", "head.weight"]
    with delta.applied(other):
        assert bits(other) == said
    assert bits(other) == before
    with pytest.raises(ModelError, match="does not record where its base is"):
        st.load_model(path)


def one_ulp(folder, name="encoder.layer.1.output.dense.weight", at=0):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1).view(torch.int32)[at] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_base_that_changed_where_the_delta_does_not_write(tmp_path):
    _, path = saved(tmp_path)
    delta = st.load(path)
    support = delta.support.get("bert.encoder.layer.1.output.dense.weight", torch.tensor([], dtype=torch.int64))
    one_ulp(tmp_path / "base", at=min(set(range(100)) - set(support.tolist())))
    with pytest.raises(BaseMismatchError, match="some weight differs"):
        st.load_model(path)
    delta.apply(classifier(tmp_path / "base"))  # the check of the places it writes sees nothing


def test_eval_holds_all_weights_against_the_digest(tiny, data, tmp_path):
    shutil.copytree(tiny, tmp_path / "base")
    config = RunConfig(
        model=str(tmp_path / "base"), task="glue/rte", budget=50, max_steps=2, data=str(data),
        out=str(tmp_path / "out"), include=("*query*",),
    )  # fmt: skip
    result = run(config)
    source = Source(str(tmp_path / "base"))
    assert evaluate_delta(source, result.delta, get("glue/rte"), str(data)) == result.evaluation
    one_ulp(tmp_path / "base")
    with pytest.raises(BaseMismatchError, match="some weight differs"):
        evaluate_delta(source, result.delta, get("glue/rte"), str(data))
    report = verify_delta(source, result.delta)
    assert (report.ok, report.base, report.weights) == (False, True, False)


def test_a_run_on_another_random_head_is_not_resumed_and_the_seed_is_named(tmp_path):
    trunk(tmp_path / "base")
    first = st.attach(classifier(tmp_path / "base", seed=1), st.id3(20, steps=5))
    state = first.state_dict()
    with pytest.raises(BaseMismatchError, match=r"No checkpoint holds them.*transformers\.set_seed"):
        st.attach(classifier(tmp_path / "base", seed=2), st.id3(20, steps=5)).load_state_dict(state)
    st.attach(classifier(tmp_path / "base", seed=1), st.id3(20, steps=5)).load_state_dict(state)
