"""Users' mistakes: none may look like success, end in a traceback or destroy a model."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_kit import make_model
from typer.testing import CliRunner

from selectune.cli import values
from selectune.cli.app import app
from selectune.cli.output import fitted
from selectune.errors import BudgetError
from selectune.models.bases import DTYPES
from selectune.recipes.named import named

pytest_plugins = ("tiny_fixtures",)
runner = CliRunner()


def call(*args, code=0):
    found = runner.invoke(app, [str(arg) for arg in args])
    assert found.exit_code == code, f"{found.output}\n{found.exception!r}"
    return found


def refused(*args, code):
    found = call(*args, code=code)
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    return found.stderr


@pytest.fixture(scope="module")
def delta(tiny, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "rte"
    common = ("--task", "glue/rte", "--data", data, "--max-steps", 2)
    call("train", "--model", tiny, *common, "--method", "lora:r=2,targets=query", "--out", out)
    return out


def test_a_merged_model_never_takes_its_base_s_place(tiny, delta, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    (tmp_path / "link").symlink_to(base)
    for out in (base, f"{base}/", tmp_path / "link"):
        assert "the base's own folder" in refused("delta", "apply", "-m", base, "-d", delta, "-o", out, code=2)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_nothing_is_written_over_another_model(tiny, delta, tmp_path):
    other = shutil.copytree(tiny, tmp_path / "other")
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    told = refused("delta", "apply", "-m", tiny, "-d", delta, "-o", other, code=2)
    assert "is not empty, and nothing is overwritten" in told
    weights = other / "model.safetensors"
    scale = ("delta", "scale", delta, "--by", 0.5, "--model", tiny)
    assert "only a delta is overwritten" in refused(*scale, "--out", weights, code=1)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_merged_model_that_is_not_written_is_no_success(tiny, delta, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file" in refused("delta", "apply", "-m", tiny, "-d", delta, "-o", file, code=2)
    assert file.read_text() == "mine"


def test_a_folder_that_cannot_be_made(tiny, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "below"
    train = ("train", "-m", tiny, "-t", "glue/rte", "--data", data, "-b", 10, "--max-steps", 1)
    assert f"{out} cannot be made: {tmp_path / 'file'} is a file" in refused(*train, "-o", out, code=2)


def test_a_model_without_its_tokenizer_is_not_trained(tiny, data, tmp_path):
    bare = shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    train = ("train", "-m", bare, "-t", "glue/rte", "--data", data, "-b", 10, "--max-steps", 1, "-o", tmp_path / "out")
    assert "comes without its tokenizer" in refused(*train, code=1)


def test_the_difference_of_two_architectures(tiny, tmp_path):
    from transformers import GPT2Config, GPT2Model

    folder = make_model(tmp_path / "gpt2")
    GPT2Model(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    for base, tuned in ((tiny, folder), (folder, tiny)):
        text = refused("delta", "diff", "--base", base, "--tuned", tuned, "-o", tmp_path / "out", code=1)
        assert "of another kind" in text


def test_a_dense_peer_s_delta_shows_its_size(delta):
    text = call("delta", "show", delta).stdout
    # 2 layers x (2 x 32 + 32 x 2) of lora, 2 x 32 + 2 of the head
    assert "whole     322 scalars in 6 tensors" in text
    assert "(whole)" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1,000", 1000), ("320_000", 320_000), ("1,234,567", 1_234_567), ("1,500k", 1_500_000), ("1e5", 100_000)],
)
def test_marks_between_thousands(text, expected):
    assert values.budget(text) == expected


@pytest.mark.parametrize("text", ["0,17%", "0,0017", "1,5m", "1,50", "1_0", ",1", "1,", "1,000.5,0", "1__000"])
def test_a_comma_is_no_decimal_point(text):
    """Without its comma, 0,17% would be 17 %."""
    with pytest.raises(BudgetError, match="decimals have a point"):
        values.budget(text)


def test_methods_are_listed_with_what_they_take():
    text = call("methods").stdout
    assert "    options exp=2.0, eps=1.0, every=1, spread=cumulative, until=1.0, --budget, --train-fully\n" in text
    one = call("methods", "id3").stdout
    assert str(named(one.splitlines()[0])) == "id3"  # written with all its defaults
    assert "arXiv 2408.14470" in one
    assert json.loads(call("methods", "lora", "--json").stdout)["options"]["r"] == 8
    assert "Unknown method 'id4'" in call("methods", "id4", code=2).stderr


def test_a_file_of_options(tiny, data, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {tiny}\ntask: glue/rte\ndata: {data}\nmethod: id3:exp=1\nbudget: 40\nmax-steps: 2\nseed: 3\n"
    )
    call("train", "--config", file, "--out", tmp_path / "first")
    run = tmp_path / "first" / "run.json"
    call("train", "--config", run, "--out", tmp_path / "again")
    deltas = [(tmp_path / name / "delta.safetensors").read_bytes() for name in ("first", "again")]
    assert deltas[0] == deltas[1]
    call("train", "--config", run, "--seed", 4, "--out", tmp_path / "other")
    told = json.loads((tmp_path / "other" / "run.json").read_text())["config"]
    assert (told["seed"], told["method"], told["budget"]) == (4, "id3:exp=1", 40)
    for text, said in (
        ("exponent: 2", "unknown option exponent"),
        ("[1", "neither YAML nor JSON"),
        ("3", "expected options"),
    ):
        file.write_text(text)
        assert said in call("train", "--config", file, "--out", tmp_path / "no", code=2).stderr
    strange = {
        "batch_size: true": "batch_size is True; it takes one value",
        "resume: 3": "resume is 3; it takes true or false",
        "include: [1]": "include is [1]; it takes a text or a list of texts",
        "max-steps: 2\nmax_steps: 3": "the option max_steps is given twice",
        "config_file: x": "unknown option config_file",
        "json: true": "unknown option json",
    }
    for text, said in strange.items():
        file.write_text(text)
        told = call("train", "--config", file, "--out", tmp_path / "no", code=2).stderr
        assert f"--config {file}: {said}" in told
    more = ("--include", "*attention*", "--epochs", 0.05)
    call(
        "train", "--config", tmp_path / "first", *more, "--out", tmp_path / "folder"
    )  # a run's folder; typed comes first
    told = json.loads((tmp_path / "folder" / "run.json").read_text())["config"]
    assert (told["epochs"], told["max_steps"], told["include"]) == (0.05, None, ["*attention*"])
    file.write_text("include: '*attention*'")
    call(
        "train",
        "--config",
        file,
        "-m",
        tiny,
        "-t",
        "glue/rte",
        "--data",
        data,
        "-b",
        9,
        "--max-steps",
        1,
        "-o",
        tmp_path / "one",
    )
    assert "there is no such file" in call("train", "--config", tmp_path / "nowhere", "--out", tmp_path, code=2).stderr


def test_long_lines_fit_a_terminal():
    text = call("methods").stdout
    found = fitted(text, 80)
    assert max(map(len, found.splitlines())) <= 80
    assert found.split() == text.split()
    assert fitted("a\n\n  b", 80) == "a\n\n  b"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("child_tuning_d", "child-tuning-d"),
        ("sparse_evolution", "set"),
        ("LoRA:r=2", "lora"),
        ("static-D3", "static-d3"),
    ],
)
def test_a_method_by_its_python_name(tiny, tmp_path, given, meant):
    train = ("train", "-m", tiny, "-t", "glue/rte", "-o", tmp_path / "out")
    assert f"Did you mean {meant}?" in refused(*train, "--method", given, code=2)


def test_an_empty_out(tiny):
    assert "out is empty" in refused("train", "-m", tiny, "-t", "glue/rte", "-b", 10, "-o", "", code=2)


def test_a_peer_is_not_told_as_a_selection(tiny, data, tmp_path):
    train = ("train", "-m", tiny, "-t", "glue/rte", "--data", data, "--max-steps", 1, "-o", tmp_path / "out")
    text = call(*train, "--method", "lora:r=2,targets=query").stdout
    assert "322 scalars trained" in text
    assert "selected" not in text


def test_one_spelling_of_sizes_and_dtypes_for_all_commands():
    spelled = ("--batch-size", 2, "--max-length", 16, "--dtype", "bfloat16")
    short = ("--batch", 2, "--length", 16, "--dtype", "bf16")
    assert call("plan", "-m", "tiny", *spelled).stdout == call("plan", "-m", "tiny", *short).stdout
    assert DTYPES["bf16"] == DTYPES["bfloat16"]
