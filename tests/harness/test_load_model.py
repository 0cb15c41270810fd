"""`st.load_model`: in a new process, the model that was trained, to the last bit."""

from __future__ import annotations

import copy
import dataclasses
import shutil

import pytest
import torch
from load_model_kit import ROWS, batch_of, classifier, heads_whole, logits_elsewhere, logits_of, tied, trained, trunk
from safetensors.torch import load_file, save_file
from torch import nn

import selectune as st
from selectune import adapters
from selectune.delta import Delta, base_info, digest_bits, weights_digest
from selectune.errors import BaseMismatchError, ConfigError, ModelError, UnknownTaskError
from selectune.harness.config import RunConfig
from selectune.harness.restore import Source, evaluate_delta, merge_delta, verify_delta
from selectune.harness.train import run
from selectune.tasks import get

pytest_plugins = ("tiny_fixtures",)
HEAD = ["classifier.bias", "classifier.weight"]


def bits(model) -> dict[str, str]:
    return {name: digest_bits(tensor) for name, tensor in model.state_dict().items()}


def saved(folder, dtype=torch.float32, kind="classifier"):
    """(what the trained model says, its delta's path) of a plain loop."""
    from transformers import AutoModelForCausalLM

    if kind == "tied":
        model = AutoModelForCausalLM.from_pretrained(tied(folder / "base", dtype))
        tuner = trained(model, st.id3(budget=60, steps=3))
    else:
        tuner = trained(model := classifier(trunk(folder / "base", dtype)), heads_whole())
    assert next(model.parameters()).dtype == dtype
    path = tuner.save(folder / "run")
    return logits_of(model), path


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
    found = st.load_model(result.delta)
    assert found.config.id2label == dict(enumerate(get("glue/rte").labels))  # pyright: ignore
    assert logits_elsewhere(result.delta.parent, tmp_path) == logits_of(found)
    value = evaluate_delta(Source(str(tiny)), result.delta, get("glue/rte"), str(data))
    assert value == result.evaluation  # of the run's own process


def test_of_the_demo_model(data, tmp_path):
    config = RunConfig(
        model="demo", task="glue/rte", budget=1000, max_steps=2, data=str(data), out=str(tmp_path), batch_size=4
    )
    result = run(config)
    from selectune.harness.models import load_model

    loaded = load_model("demo", get("glue/rte"), config.seed)
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


def test_a_seed_that_is_recorded_draws_the_head_again(tmp_path):
    trunk(tmp_path / "base")
    model = classifier(tmp_path / "base", seed=5)
    base = base_info(model, seed=5)
    tuner = trained(model, st.id3(budget=60, steps=3))
    path = tuner.save(tmp_path / "run", base=base)
    assert logits_elsewhere(path, tmp_path) == logits_of(model)
    with pytest.raises(BaseMismatchError, match=r"seed 5.*selectune\.load_model\(path\)"):
        st.load(path).apply(classifier(tmp_path / "base", seed=6))


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
    with pytest.raises(ModelError, match="not recorded"):
        st.load_model(path)


def test_a_module_is_put_on_again(tmp_path):
    trunk(tmp_path / "base")
    model = classifier(tmp_path / "base")
    adapted = adapters.put_on(model, adapters.parse("lora:r=4"), 3, keep=HEAD)
    tuner = trained(adapted.model, st.id3(budget=60, steps=3, scope=("*lora*",), train_fully=("classifier.*",)))
    path = tuner.save(tmp_path / "run")
    assert [row["name"] for row in st.load(path).info["base"]["initialised"]] == HEAD
    assert logits_elsewhere(path, tmp_path) == logits_of(adapted.model)


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
    with pytest.raises(ModelError, match=r"not recorded, its name alone.*base="):
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
