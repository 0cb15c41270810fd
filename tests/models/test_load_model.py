"""`st.load_model`: in a new process, the model that was trained, to the last bit."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from load_model_kit import (
    HEAD,
    batch_of,
    bits,
    classifier,
    heads_whole,
    logits_elsewhere,
    logits_of,
    saved,
    tied,
    trained,
    trunk,
)

import selectune as st
from selectune import adapters
from selectune.delta import Delta, base_info, weights_digest
from selectune.errors import BaseMismatchError, ConfigError, ModelError, UnknownTaskError
from selectune.models.bases import load_model as load_named
from selectune.models.restore import Source, evaluate_delta, load_base, merge_delta, verify_delta
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.tasks import get

pytest_plugins = ("tiny_fixtures",)
OWN_HEAD = """
from transformers import BertForSequenceClassification


class Halved(BertForSequenceClassification):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output
"""


KINDS = [
    ("classifier", torch.float32),
    ("classifier", torch.bfloat16),
    ("tied", torch.float32),
    ("tied", torch.bfloat16),
]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_of_a_plain_loop(tmp_path, kind, dtype):
    said, path = saved(tmp_path, dtype, kind)
    assert logits_elsewhere(path.parent, tmp_path) == said


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_of_the_trainer(tmp_path, kind, dtype):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from selectune.integrations.transformers import SelectuneCallback

    if kind == "tied":
        model = AutoModelForCausalLM.from_pretrained(tied(tmp_path / "base", dtype))
        tuner = st.attach(model, st.id3(budget=60, steps=4))
    else:
        tuner = st.attach(model := classifier(trunk(tmp_path / "base", dtype)), heads_whole(steps=4))
    batch = batch_of(model)
    rows = [{key: value[number] for key, value in batch.items()} for number in (0, 1)] * 4
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=2, save_steps=2, learning_rate=1e-2,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows, callbacks=[SelectuneCallback(tuner)]).train()  # pyright: ignore
    assert tuner.selected == 60
    assert logits_elsewhere(tmp_path / "out" / "checkpoint-4", tmp_path) == logits_of(model)
    first, last = (st.load(tmp_path / "out" / f"checkpoint-{step}") for step in (2, 4))
    assert first.info["base"]["weights"] == last.info["base"]["weights"] is not None


@pytest.mark.parametrize("change", [{}, {"dtype": "bf16"}, {"train_fully": ("classifier.*",)}, {"on": "lora:r=4"}])
def test_of_the_command_line(tiny, data, tmp_path, change):
    config = RunConfig(
        model=str(tiny), task="glue/rte", budget=100, max_steps=4, lr=5e-3, data=str(data), out=str(tmp_path / "out"),
        seed=1, **change,
    )  # fmt: skip
    result = run(config)
    delta = st.load(result.delta)
    loaded = load_base(Source(str(tiny)), delta, get("glue/rte"))  # as `selectune eval` does, by the task
    delta.apply(loaded.model, full=True)
    assert logits_elsewhere(result.delta.parent, tmp_path) == logits_of(loaded.model)
    found: Any = st.load_model(result.delta)
    assert found.config.id2label == dict(enumerate(get("glue/rte").labels))
    value = evaluate_delta(Source(str(tiny)), result.delta, get("glue/rte"), str(data))
    assert value == result.evaluation  # of the run's own process


def test_of_the_demo_model(data, tmp_path):
    config = RunConfig(
        model="demo", task="glue/rte", budget=1000, max_steps=2, data=str(data), out=str(tmp_path), batch_size=4
    )
    result = run(config)
    loaded = load_named("demo", get("glue/rte").head, config.seed)
    st.load(result.delta).apply(loaded.model, full=True)
    assert st.load(result.delta).info["base"]["id"] == "demo"
    assert logits_elsewhere(result.delta, tmp_path) == logits_of(loaded.model)


def test_a_folder_that_was_named_from_elsewhere(tmp_path, monkeypatch):
    trunk(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    tuner = trained(model := classifier("base"), heads_whole())  # pyright: ignore[reportArgumentType]
    path = tuner.save("run")
    info = st.load(path).info
    assert info["model"]["path"] == str(tmp_path / "base")
    assert (info["base"]["id"], info["base"]["revision"]) == ("base", None)
    (tmp_path / "elsewhere").mkdir()
    assert logits_elsewhere(tmp_path / "run", tmp_path / "elsewhere") == logits_of(model)


def test_a_model_of_the_hub_at_its_commit(tmp_path, monkeypatch):
    commit, cache = "0123456789" * 4, tmp_path / "cache"
    place = cache / "models--org--name"
    (place / "snapshots").mkdir(parents=True)
    (place / "refs").mkdir()
    trunk(tmp_path / "base").rename(place / "snapshots" / commit)
    (place / "refs" / "main").write_text(commit)
    tuner = trained(model := classifier("org/name", cache_dir=str(cache)), heads_whole())  # pyright: ignore
    info = tuner.delta().info
    assert (info["base"]["id"], info["base"]["revision"], info["model"]["path"]) == ("org/name", None, None)
    model.config._commit_hash = commit  # transformers before 5.23 leaves it there
    path = tuner.save(tmp_path / "run")
    assert st.load(path).info["base"]["revision"] == commit
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert load_named("org/name", get("glue/rte").head, 1).base()["revision"] == commit
    (place / "refs" / "main").write_text("f" * 40)  # the branch went on
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert logits_elsewhere(path, tmp_path) == logits_of(model)


def test_the_head_is_recorded(tmp_path):
    trunk(tmp_path / "base")
    options = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}, "num_labels": 2}
    tuner = trained(
        classifier(tmp_path / "base", problem_type="multi_label_classification", **options), heads_whole(), 0
    )
    delta = tuner.delta(allow_empty=True)
    assert delta.info["model"] == {
        "architecture": "BertForSequenceClassification",
        "dtype": "float32",
        "labels": ["no", "yes"],
        "num_labels": 2,
        "pad_token_id": 0,
        "path": str(tmp_path / "base"),
        "problem_type": "multi_label_classification",
    }
    config: dict = st.load_model(delta.save(tmp_path / "run")).config.to_dict()  # pyright: ignore
    assert {key: config[key] for key in options if key != "num_labels"} == {
        k: options[k] for k in ("id2label", "label2id")
    }
    assert config["problem_type"] == "multi_label_classification"


def test_a_seed_that_is_recorded_draws_the_head_again(tmp_path):
    trunk(tmp_path / "base")
    model = classifier(tmp_path / "base", seed=5)
    base = base_info(model, seed=5)
    tuner = trained(model, st.id3(budget=60, steps=3))
    path = tuner.save(tmp_path / "run", base=base)
    assert logits_elsewhere(path, tmp_path) == logits_of(model)
    with pytest.raises(BaseMismatchError, match=r"seed 5.*selectune\.load_model\(path\)"):
        st.load(path).apply(classifier(tmp_path / "base", seed=6))


def test_a_module_is_put_on_again(tmp_path):
    trunk(tmp_path / "base")
    model = classifier(tmp_path / "base")
    adapted = adapters.put_on(model, adapters.parse("lora:r=4"), 3, keep=HEAD)
    tuner = trained(adapted.model, st.id3(budget=60, steps=3, scope=("*lora*",), train_fully=("classifier.*",)))
    path = tuner.save(tmp_path / "run")
    assert [row["name"] for row in st.load(path).info["base"]["initialised"]] == HEAD
    assert logits_elsewhere(path, tmp_path) == logits_of(adapted.model)


def test_a_base_that_moved(tmp_path):
    said, path = saved(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"was the folder .*base, which does not exist here.*base=\.\.\."):
        st.load_model(path)
    assert logits_elsewhere(path, tmp_path, base=str(tmp_path / "moved")) == said


def changed(path, **fields) -> Delta:
    delta = st.load(path)
    return Delta(delta.patches, delta.dense, {**delta.info, **fields})


def test_a_file_of_an_older_selectune(tiny, data, tmp_path):
    config = RunConfig(
        model=str(tiny), task="glue/rte", budget=100, max_steps=2, data=str(data), out=str(tmp_path / "out"), seed=1
    )
    delta = st.load(run(config).delta)
    base = {**delta.info["base"], "weights": None}
    info = {**{key: value for key, value in delta.info.items() if key != "model"}, "base": base}
    old = Delta(delta.patches, delta.dense, info)
    with pytest.raises(ModelError, match=r"does not record where its base is, only its name.*base="):
        st.load_model(old.save(tmp_path / "old"))
    model = st.load_model(tmp_path / "old", base=tiny)
    assert bits(model) == bits(st.load_model(tmp_path / "out"))
    old.revert(model)
    everything = Delta(old.patches, old.dense, {**info, "base": {**base, "weights": weights_digest(model)}})
    everything.apply(model, full=True)  # its digest is over all tensors, the head too


@pytest.mark.parametrize("name", ["Trainer", "AutoConfig", "BertTokenizer", "os", "NoSuchModel"])
def test_a_class_that_is_no_model_of_transformers(tmp_path, name):
    _, path = saved(tmp_path)
    model = {**st.load(path).info["model"], "architecture": name}
    with pytest.raises(ModelError, match=f"The class {name} is none of the models of transformers"):
        st.load_model(changed(path, model=model).save(tmp_path / "bad"))


def test_code_of_the_base_is_run_if_it_is_trusted_only(tmp_path, monkeypatch):
    folder = trunk(tmp_path / "base")
    (folder / "own_head.py").write_text(OWN_HEAD)
    monkeypatch.syspath_prepend(folder)
    from own_head import Halved  # pyright: ignore[reportMissingImports]

    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "own_head.Halved"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    tuner = trained(model := Halved.from_pretrained(folder, num_labels=3), heads_whole())
    path = tuner.save(tmp_path / "run")
    with pytest.raises(ModelError, match=r"class Halved is none of the models.*trust_remote_code=True"):
        st.load_model(path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert logits_elsewhere(path, tmp_path, trust_remote_code=True) == logits_of(model)


def test_a_task_that_is_unknown_here(tiny, data, tmp_path):
    config = RunConfig(
        model=str(tiny), task="glue/rte", budget=100, max_steps=2, data=str(data), out=str(tmp_path / "out"), seed=1
    )
    path = run(dataclasses.replace(config, train_fully=("classifier.*",))).delta
    info = st.load(path).info
    other = changed(path, method={**info["method"], "task": "own/seven"}).save(tmp_path / "other")
    source = Source(str(tiny))
    with pytest.raises(UnknownTaskError, match="Unknown task 'own/seven'"):
        verify_delta(source, other)
    with pytest.raises(UnknownTaskError, match="Unknown task 'own/seven'"):
        merge_delta(source, other, tmp_path / "merged")
    for act in (
        lambda: evaluate_delta(source, other, get("glue/stsb"), str(data)),
        lambda: verify_delta(source, other, get("glue/stsb")),
        lambda: merge_delta(source, other, tmp_path / "merged", get("glue/stsb")),
    ):
        with pytest.raises(UnknownTaskError, match="Unknown task 'own/seven'"):
            act()
    assert verify_delta(source, other, get("glue/rte")).ok
    assert bits(st.load_model(other)) == bits(st.load_model(path))


def test_what_is_asked_for_wrongly(tmp_path):
    _, path = saved(tmp_path)
    with pytest.raises(ConfigError, match="Unknown dtype"):
        st.load_model(path, dtype="fp31")
    with pytest.raises(BaseMismatchError, match="dtype BF16, expected F32"):
        st.load_model(path, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="no revisions"):
        st.load_model(path, revision="main")
