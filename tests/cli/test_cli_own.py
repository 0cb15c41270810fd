"""Rows of one's own on the command line."""

from __future__ import annotations

import json
import random

import pytest
from cli_kit import call
from tiny_kit import sentence, write_rows

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def files(tmp_path):
    rng = random.Random(0)
    for name, count in (("train", 40), ("more", 20)):
        pairs = [(sentence(rng), sentence(rng)) for _ in range(count)]
        rows = [{"p": p, "h": h, "a": "yes" if "dog" in p.split() else "no"} for p, h in pairs]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def test_train_and_eval(tiny, data, files):
    train = ("train", "-m", tiny, "--train", files / "train.jsonl", "--text", "p,h", "--label", "a", "-b", 100)
    steps = ("--max-steps", 2, "-o", files / "out", "--json")
    printed = json.loads(call(*train, "--validation", files / "more.jsonl", "--train-size", 30, *steps).stdout)
    assert (printed["task"], printed["metric"], printed["examples"]) == ("own", "accuracy", 20)
    assert printed["kind"] == "classification"
    assert json.loads((files / "out" / "run.json").read_text())["kind"] == "classification"
    for more in ((), ("--validation", files / "more.jsonl"), ("--validation", files / "more.jsonl", "--text", "p,h")):
        found = json.loads(call("eval", "-m", tiny, "-d", files / "out", *more, "--json").stdout)
        assert found["value"] == printed["value"]
    again = call("train", "--config", files / "out" / "run.json", "--out", files / "again", "--json")
    assert json.loads(again.stdout)["value"] == printed["value"]
    held = ("train", "--config", files / "out" / "run.json", "--hold-out", 0.2, "--train-size", 20)  # typed options win
    assert json.loads(call(*held, "--out", files / "held", "--json").stdout)["examples"] == 8
    other = ("train", "--config", files / "held" / "run.json", "--task", "glue/rte", "--data", data)
    assert json.loads(call(*other, "--out", files / "rte", "--json").stdout)["task"] == "glue/rte"
    plain = call("train", "--config", files / "out" / "run.json", "--out", files / "plain").stdout
    assert plain.startswith("own (classification): accuracy ")
    assert call("verify", "-m", tiny, "-d", files / "out").stdout.startswith("ok")
    call("delta", "apply", "-m", tiny, "-d", files / "out", "-o", files / "merged")
    card = json.loads(call("push", files / "out", "org/name", "--json").stdout)["card"]
    (line,) = (line for line in card.splitlines() if line.startswith("selectune eval "))
    words = {"BASE": tiny, "org/name": files / "out", "FILE": files / "more.jsonl"}
    found = call(*(words.get(word, word) for word in line.split()[1:]), "--json")
    assert json.loads(found.stdout)["value"] == printed["value"]
    told = call(*train, *steps[:-1], "--overwrite", code=2).stderr
    assert "--validation FILE" in told
    assert "--hold-out 0.1" in told
    write_rows(files / "more.jsonl", [{"p": "a", "h": "b", "a": "maybe"}])
    told = call("eval", "-m", tiny, "-d", files / "out", "--validation", files / "more.jsonl", code=1).stderr
    assert "more.jsonl, line 1: the label in 'a' is 'maybe', which does not occur in training" in told


def test_eval_of_a_delta_knows_its_task(tiny, data, tmp_path):
    common = ("--data", data, "--json")
    made = call("train", "-m", tiny, "-t", "glue/rte", "-b", 50, "--max-steps", 2, "-o", tmp_path / "out", *common)
    found = call("eval", "-m", tiny, "-d", tmp_path / "out", *common)
    assert json.loads(found.stdout)["value"] == json.loads(made.stdout)["value"]
    told = call("eval", "-m", tiny, "-d", tmp_path / "out", "--text", "q", code=2).stderr
    assert "records the task glue/rte, which has its own rows" in told
