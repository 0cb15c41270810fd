"""Several patterns: what each run learns from, what is recorded, going on after a stop, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch
from cli_kit import call
from lm_kit import make_llama
from tiny_kit import sentence, write_rows

import selectune as st
from selectune import tasks
from selectune.errors import ConfigError, TaskError
from selectune.models.restore import Source, evaluate_delta, task_of
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.study import ensemble
from selectune.study.ensemble import Ensemble, run_ensemble
from selectune.tasks.soft import counts_of

pytest_plugins = ("tiny_fixtures",)

PATTERNS = ("{} and {} is", "the first: {} the second: {} this is", "{} {} it is")
WORDS = (("small", "big"),)
FEW = {"task": "glue/rte", "budget": 200, "max_steps": 2, "batch_size": 4, "lr": 1e-2, "train_size": 4}


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """Rows without a label, with a column that is in the way of answers."""
    draw, path = random.Random(3), tmp_path_factory.mktemp("more") / "rows.jsonl"
    texts = [{"sentence1": sentence(draw), "sentence2": sentence(draw), "prediction": "old"} for _ in range(30)]
    write_rows(path, texts)
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def classes(rows):
    labels = list(tasks.get("glue/rte").labels)
    found = [labels.index(row["prediction"]["label"]) for row in rows]
    return [found.count(0), found.count(1)]


def test_two_generations_by_one_command(causal, data, more, tmp_path):
    given = ["--model", causal, "--task", "glue/rte", "--data", data, "--budget", 200, "--max-steps", 2,
             "--batch-size", 4, "--lr", 1e-2, "--train-size", 4, "--words", "small,big", "--unlabeled", more,
             "--generations", 2, "--growth", 3]  # fmt: skip
    for pattern in PATTERNS:
        given += ["--pattern", pattern]
    told = json.loads(call("train", *given, "--out", tmp_path / "a", "--json").stdout)
    record = json.loads((tmp_path / "a/ensemble/ensemble.json").read_text())
    assert told["ensemble"] == record
    first, second = record["generations"]
    rte = tasks.get("glue/rte")
    labelled = tasks.first_rows(rte, tasks.load(rte, "train", data), 4).examples
    had = counts_of(rte, labelled)
    assert [model["rows"] for model in first] == [had] * 3
    said = [lines(tmp_path / f"a/ensemble/generation-1/pattern-{i}/answers.jsonl") for i in (1, 2, 3)]
    for i, model in enumerate(second, 1):
        rows = lines(tmp_path / f"a/ensemble/generation-2/pattern-{i}/rows.jsonl")
        assert classes(rows) == model["rows"]
        assert [(row["sentence1"], row["sentence2"]) for row in rows[:4]] == [e.texts for e in labelled]
        # one other of the first generation gave the labels, which are its own: two new rows for each old one
        grown = {row["sentence1"]: row["prediction"]["label"] for row in rows[4:]}
        by = [{row["sentence1"]: row["prediction"]["label"] for row in each} for each in said]
        assert any(grown.items() <= by[j].items() for j in range(3) if j != i - 1)
        available = [classes(each) for j, each in enumerate(said) if j != i - 1]
        assert model["rows"] in [[c + min(2 * c, n) for c, n in zip(had, each, strict=True)] for each in available]

    last = [lines(tmp_path / f"a/ensemble/generation-2/pattern-{i}/answers.jsonl") for i in (1, 2, 3)]
    labels = rte.labels
    p = torch.tensor([[[row["prediction"]["probabilities"][n] for n in labels] for row in each] for each in last])
    wanted = tasks.soft_labels(p.double(), record["weights"], 2.0).tolist()
    soft = tasks.read_soft(rte, str(tmp_path / "a/ensemble/soft-labels.jsonl"))
    assert [example.label for example in soft.examples] == wanted
    assert [row["sentence1"] for row in lines(more)] == [example.texts[0] for example in soft.examples]

    delta = st.load(tmp_path / "a")
    assert delta.info["method"]["soft_labels"] == soft.digest
    known = task_of(delta)
    assert known is not None
    assert known.kind.name == "classification"
    assert evaluate_delta(Source(str(causal)), tmp_path / "a", known, str(data)).value == told["value"]
    assert told["config"]["soft_labels"] == str(tmp_path / "a/ensemble/soft-labels.jsonl")
    before = (tmp_path / "a/delta.safetensors").read_bytes()
    assert "--overwrite" in call("train", *given, "--out", tmp_path / "a", code=2).stderr
    assert "generation 2, pattern 3" in call("train", *given, "--out", tmp_path / "a", "--overwrite").stdout
    assert (tmp_path / "a/delta.safetensors").read_bytes() == before


def test_an_ensemble_that_was_stopped_goes_on_to_the_same_bits(causal, data, more, tmp_path, monkeypatch):
    plan = Ensemble(PATTERNS[:2], WORDS, str(more), student="pattern")
    config = {**FEW, "model": str(causal), "data": str(data)}
    whole, _ = run_ensemble(RunConfig(**config, out=str(tmp_path / "whole")), plan)
    assert whole.kind == "cloze"
    done = []

    def stopping(config, *args):
        if done and "pattern-2" in config.out:
            raise KeyboardInterrupt
        done.append(config.out)
        return run(config, *args)

    stopped = RunConfig(**config, out=str(tmp_path / "stopped"))
    monkeypatch.setattr(ensemble, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_ensemble(stopped, plan)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="holds runs of an ensemble"):
        run_ensemble(stopped, plan)
    other = Ensemble(PATTERNS[:2], WORDS, str(more), temperature=1.0, student="pattern")
    with pytest.raises(ConfigError, match="other settings or rows: ensemble"):
        run_ensemble(stopped, other, resume=True)
    monkeypatch.setattr(ensemble, "run", lambda config, *args: (done.append(config.out), run(config, *args))[1])
    run_ensemble(stopped, plan, resume=True)
    assert [path.split("stopped")[1] for path in done] == [f"/ensemble/generation-1/pattern-{i}" for i in (1, 2)] + [""]
    there, here = (tmp_path / name / "delta.safetensors" for name in ("whole", "stopped"))
    assert there.read_bytes() == here.read_bytes()
    with pytest.raises(ConfigError, match="no ensemble to resume"):
        run_ensemble(RunConfig(**config, out=str(tmp_path / "new")), plan, resume=True)


@pytest.mark.parametrize(
    "method", [{"on": "lora:r=2"}, {"method": "lora:r=2", "budget": None}, {"method": "full", "budget": None}]
)
def test_an_ensemble_composes_with_methods_and_adapters(causal, data, more, tmp_path, method):
    config = RunConfig(**{**FEW, **method}, model=str(causal), data=str(data), out=str(tmp_path))
    found, record = run_ensemble(config, Ensemble(PATTERNS[:2], WORDS, str(more)))
    assert found.verification.changed + found.verification.dense > 0
    assert len(record["generations"][0]) == 2


def test_rows_of_ones_own_are_learned_by_several_patterns(causal, tmp_path):
    draw = random.Random(2)
    rows = [{"text": sentence(draw), "label": ("yes", "no")[i % 2]} for i in range(24)]
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "new.jsonl", [{"text": sentence(draw)} for _ in range(8)])
    call("train", "--model", causal, "--train", tmp_path / "rows.jsonl", "--hold-out", "0.25", "--text", "text",
         "--label", "label", "--pattern", "{} is it", "--words", "sad,happy", "--pattern", "{} so it is", "--words",
         "small,big", "--unlabeled", tmp_path / "new.jsonl", "--budget", "200", "--max-steps", "1", "--out",
         tmp_path / "run")  # fmt: skip
    value = json.loads((tmp_path / "run/run.json").read_text())["value"]
    again = call("eval", "--model", causal, "--delta", tmp_path / "run", "--json").stdout
    assert json.loads(again)["value"] == value
    one = json.loads((tmp_path / "run/ensemble/generation-1/pattern-2/run.json").read_text())["config"]
    assert (one["pattern"], one["words"]) == ("{} so it is", ["small", "big"])


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"patterns": PATTERNS[:1]}, "two patterns at least, got 1"),
        ({"patterns": PATTERNS[:1] * 2}, "the same and have the same words"),
        ({"words": ()}, "need one list of words, or as many lists, got 0"),
        ({"words": WORDS * 2}, "as many lists, got 2"),
        ({"generations": 0}, "generations=0: must be an int of at least 1"),
        ({"growth": 1}, "growth=1: must be an int of at least 2"),
        ({"temperature": 0.0}, "temperature=0.0: must be a finite number above 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"student": "heads"}, "Unknown student 'heads'. Known: head, pattern"),
    ],
)
def test_ensembles_that_cannot_be_are_told(given, why):
    with pytest.raises(ConfigError, match=why):
        Ensemble(**{"patterns": PATTERNS, "words": WORDS, "unlabelled": "rows.jsonl", **given})


def test_options_and_rows_that_do_not_fit_are_told(causal, data, more, tmp_path):
    given = ["train", "--model", causal, "--task", "glue/rte", "--data", data, "--budget", 9, "--out", tmp_path / "out"]
    two = ["--pattern", PATTERNS[0], "--pattern", PATTERNS[1], "--words", "small,big"]
    assert "--unlabeled FILE" in call(*given, *two, code=2).stderr
    assert "--unlabeled FILE" in call(*given, "--generations", 2, code=2).stderr
    assert "two patterns at least" in call(*given, *two[:2], *two[4:], "--unlabeled", more, code=2).stderr
    resumed = call(*given, *two, "--unlabeled", more, "--resume-from", "x", code=2)
    assert "go on with --resume" in resumed.stderr
    assert "--shots is for one pattern" in call(*given, *two, "--unlabeled", more, "--shots", 1, code=2).stderr
    assert "does not exist" in call(*given, *two, "--unlabeled", tmp_path / "none.jsonl", code=1).stderr
    (tmp_path / "none.jsonl").write_text("")
    assert "has no rows to label" in call(*given, *two, "--unlabeled", tmp_path / "none.jsonl", code=1).stderr
    write_rows(tmp_path / "other.jsonl", [{"sentence1": "a"}])
    told = call(*given, *two, "--unlabeled", tmp_path / "other.jsonl", code=1).stderr
    assert "line 1 has no column" in told
    assert "sentence2" in told
    assert not (tmp_path / "out").exists()
    soft = ["--soft-labels", more]
    assert "not both" in call(*given, *two, "--unlabeled", more, *soft, code=2).stderr
    assert "train_size=4" in call(*given, *soft, "--train-size", 4, code=2).stderr
    assert "line 1: 'prediction' must have" in call(*given, *soft, code=1).stderr
    with pytest.raises(TaskError, match="does not exist"):
        run(RunConfig(**{**FEW, "train_size": None}, model=str(causal), data=str(data), out=str(tmp_path / "out"),
                      soft_labels=str(tmp_path / "gone.jsonl")))  # fmt: skip


def test_overwriting_makes_room_before_anything_is_trained(causal, data, more, tmp_path):
    """Else the last model would go on from an earlier run's checkpoints, or be refused for its delta."""
    config = RunConfig(**{**FEW, "save_every": 1}, model=str(causal), data=str(data), out=str(tmp_path))
    run(dataclasses.replace(config, task="glue/cola"))
    _, record = run_ensemble(config, Ensemble(PATTERNS[:2], WORDS, str(more)), overwrite=True)
    assert record["student"]["rows"] == 30
