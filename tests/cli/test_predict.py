"""`selectune predict`: rows in their order with what was predicted, gone on with after a stop, without a label."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
from typing import Any

import pytest
from cli_kit import call
from tiny_kit import sentence, write_rows

from selectune.errors import ConfigError, TaskError
from selectune.models import predictions
from selectune.models.predictions import predict_rows
from selectune.models.restore import Source, task_of
from selectune.tasks.kinds import Classification

pytest_plugins = ("tiny_fixtures",)

LABELS = {
    "classification": lambda text: "a dog" if "dog" in text.split() else "none",
    "regression": lambda text: round(len(text) / 12, 2),
    "multilabel": lambda text: [word for word in ("dog", "the", "big") if word in text.split()],
}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A run of each kind, and rows to predict: 70 of them, in three batches."""
    folder, rng = tmp_path_factory.mktemp("runs"), random.Random(0)
    texts = [sentence(rng) for _ in range(70)]
    write_rows(folder / "train.jsonl", [{"q": t} | {k: make(t) for k, make in LABELS.items()} for t in texts])
    write_rows(folder / "rows.jsonl", [{"id": i, "q": t} for i, t in enumerate(texts)])
    for kind in LABELS:
        args = ("-b", 100, "--max-steps", 2, "--lr", "5e-3", "-o", folder / kind)
        call("train", "-m", tiny, "--train", folder / "train.jsonl", "--validation", folder / "train.jsonl",
             "--text", "q", "--label", kind, *args)  # fmt: skip
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("kind", LABELS)
def test_predictions_are_those_of_eval_in_the_order_of_the_rows(tiny, runs, tmp_path, kind):
    out = tmp_path / "answers.jsonl"
    told = call("predict", "-m", tiny, "-d", runs / kind, "-i", runs / "rows.jsonl", "-o", out, "--json")
    assert json.loads(told.stdout) == {"out": str(out), "rows": 70, "task": "own", "kind": kind}
    found, given = lines(out), lines(runs / "train.jsonl")
    assert [(row["id"], row["q"]) for row in found] == [(i, row["q"]) for i, row in enumerate(given)]
    value = json.loads((runs / kind / "run.json").read_text())["value"]
    answers = [row["prediction"] for row in found]
    if kind == "classification":
        assert sum(a["label"] == row[kind] for a, row in zip(answers, given, strict=True)) / 70 == value
        for answer in answers:
            assert answer["probabilities"].keys() == {"a dog", "none"}
            assert sum(answer["probabilities"].values()) == pytest.approx(1)
            assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].__getitem__)
    elif kind == "multilabel":
        hits = sum(len({*a["labels"]} & {*row[kind]}) for a, row in zip(answers, given, strict=True))
        size = sum(len(a["labels"]) + len(row[kind]) for a, row in zip(answers, given, strict=True))
        assert 2 * hits / size == pytest.approx(value)
    else:
        from selectune.tasks.metrics import pearson_spearman

        assert pearson_spearman(answers, [row[kind] for row in given]) == value
    assert not (tmp_path / "answers.jsonl.partial").exists()
    assert (
        "exists and would be lost"
        in call("predict", "-m", tiny, "-d", runs / kind, "-i", runs / "rows.jsonl", "-o", out, code=2).stderr
    )


def test_other_columns_formats_and_published_tasks(tiny, runs, data, tmp_path):
    (tmp_path / "rows.csv").write_text("words,n\nthe dog,1\na cat,2\n")
    args = ("-i", tmp_path / "rows.csv", "-o", tmp_path / "a.jsonl")
    call("predict", "-m", tiny, "-d", runs / "classification", "--text", "words", *args)
    assert [row["n"] for row in lines(tmp_path / "a.jsonl")] == ["1", "2"]
    told = call("predict", "-m", tiny, "-d", runs / "classification", *args, "--overwrite", code=1).stderr
    assert "rows.csv, line 2 has no column 'q'. It has 'words', 'n'." in told
    call("train", "-m", tiny, "-t", "glue/rte", "--data", data, "-b", 50, "--max-steps", 1, "-o", tmp_path / "rte")
    write_rows(tmp_path / "pairs.jsonl", [{"sentence1": "the dog", "sentence2": "a cat"}])
    call("predict", "-m", tiny, "-d", tmp_path / "rte", "-i", tmp_path / "pairs.jsonl", "-o", tmp_path / "b.jsonl")
    assert lines(tmp_path / "b.jsonl")[0]["prediction"]["label"] in ("entailment", "not_entailment")


def test_a_merged_model_needs_no_delta(tiny, runs, tmp_path):
    rows, with_delta = runs / "rows.jsonl", tmp_path / "with.jsonl"
    call("predict", "-m", tiny, "-d", runs / "classification", "-i", rows, "-o", with_delta)
    call("delta", "apply", "-m", tiny, "-d", runs / "classification", "-o", tmp_path / "merged")
    args = ("--kind", "classification", "--text", "q", "--max-length", 32)
    call("predict", "-m", tmp_path / "merged", *args, "-i", rows, "-o", tmp_path / "merged.jsonl")
    assert (tmp_path / "merged.jsonl").read_bytes() == with_delta.read_bytes()
    told = call("predict", "-m", tiny, *args, "-i", rows, "-o", tmp_path / "none.jsonl", code=2).stderr
    assert "has no head for this: classifier.bias, classifier.weight would be drawn at random" in told
    told = call("predict", "-m", tmp_path / "merged", "-i", rows, "-o", tmp_path / "none.jsonl", code=2).stderr
    assert "does not say what its task is" in told


def predicted(tiny, runs, out, **more: Any):
    return predict_rows(Source(str(tiny)), str(runs / "classification"), str(runs / "rows.jsonl"), str(out), **more)


@pytest.mark.parametrize("torn", [0, 7])
def test_an_interrupted_file_goes_on_and_ends_with_the_same_bits(tiny, runs, tmp_path, monkeypatch, torn):
    straight, out, partial = (tmp_path / name for name in ("straight.jsonl", "out.jsonl", "out.jsonl.partial"))
    predicted(tiny, runs, straight)

    class Asked(BaseException):
        pass

    def stop(done, batches):
        assert batches == 3
        if done == 2:
            raise Asked

    with pytest.raises(Asked):
        predicted(tiny, runs, out, follow=stop)
    assert not out.exists()
    assert len(lines(partial)) == 1 + 64
    if torn:
        partial.write_bytes(partial.read_bytes()[:-torn])  # a kill in the middle of the last line
    batches, original = [], Classification.answers
    monkeypatch.setattr(Classification, "answers", lambda *a: batches.append(len(a[4])) or original(*a))
    predicted(tiny, runs, out)
    assert batches == ([32, 6] if torn else [6])
    assert out.read_bytes() == straight.read_bytes()
    assert not partial.exists()


def test_what_is_left_of_something_else_is_not_gone_on_with(tiny, runs, tmp_path):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"

    def stop(done, batches):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predicted(tiny, runs, out, follow=stop)
    before = partial.read_bytes()
    with pytest.raises(ConfigError, match=r"out\.jsonl\.partial is of another model, delta, file of rows or setting"):
        predicted(tiny, runs, out, max_length=8)
    assert partial.read_bytes() == before
    for spoiled in (b"X[0, 1]\n", b"[1]\n", b"[70, 1]\n", b'"ab"\n'):
        partial.write_bytes(before + spoiled)
        with pytest.raises(ConfigError, match=r"partial, line \d+ is no prediction of one of 70 rows"):
            predicted(tiny, runs, out)
        assert partial.read_bytes() == before + spoiled
    predicted(tiny, runs, out, max_length=8, overwrite=True)
    assert len(lines(out)) == 70


def test_two_processes_do_not_write_one_file(tiny, runs, tmp_path):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with open(partial, "wb") as held:
        held.write(b"of another")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="is being written by another process"):
                predicted(tiny, runs, out, overwrite=overwrite)
    assert partial.read_bytes() == b"of another"


def test_ctrl_c_leaves_a_file_that_goes_on(tiny, runs, tmp_path, monkeypatch):
    args = ("predict", "-m", tiny, "-d", runs / "regression", "-i", runs / "rows.jsonl", "-o", tmp_path / "out.jsonl")
    original, seen = predictions._Partial.add, []

    def add(self, made):
        original(self, made)
        seen.append(len(made))
        if len(seen) == 2:
            from selectune.cli import signals

            raise signals.StoppedBySignal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(predictions._Partial, "add", add)
        told = call(*args, code=130).stderr
    assert "stopped: by Ctrl-C, and " in told
    assert "out.jsonl.partial has what was done: the same command goes on from there" in told
    call(*args)
    assert len(lines(tmp_path / "out.jsonl")) == 70
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_rows_that_cannot_be_answered(tiny, runs, tmp_path):
    for row, message in (
        ({"q": "x", "prediction": 1}, r"line 1 has a column 'prediction' already"),
        ({"q": " "}, r"line 1 is empty"),
        ({"q": 3}, r"line 1: the texts of own must be strings"),
    ):
        write_rows(tmp_path / "rows.jsonl", [row])
        with pytest.raises(TaskError, match=message):
            predict_rows(
                Source(str(tiny)), str(runs / "regression"), str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl")
            )
    (tmp_path / "rows.jsonl").write_text("\n\n")
    given = ("-m", tiny, "-i", tmp_path / "rows.jsonl", "-o", tmp_path / "out.jsonl")
    assert "has no rows, so there is nothing" in call("predict", *given, "-d", runs / "regression", code=1).stderr
    assert "has no rows, so there is nothing" in call("generate", *given, "--text", "q", code=1).stderr
    assert "--max-length" in call("predict", *given, "-d", runs / "regression", "--max-length", 0, code=2).stderr
    assert "a pattern and words" in call("predict", *given, "--kind", "cloze", "--text", "q", code=2).stderr
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl"]


def test_a_delta_of_own_rows_has_no_published_task(runs):
    import selectune as st

    assert task_of(st.load(runs / "regression")) is None


def test_answers_go_into_a_file_of_their_own(tiny, runs, tmp_path):
    """All of this is refused before the model is loaded."""
    source, delta, rows = Source("no/such/model"), str(runs / "classification"), str(runs / "rows.jsonl")
    for out, message in (
        ("", "lies in no folder that exists"),
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "no" / "out.jsonl"), "lies in no folder that exists"),
        (rows, "is the file of rows itself"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict_rows(source, delta, rows, out, overwrite=True)


def test_other_rows_have_as_many_columns_of_text(tiny, runs, tmp_path):
    args = (Source(str(tiny)), str(runs / "classification"), str(runs / "rows.jsonl"), str(tmp_path / "out.jsonl"))
    with pytest.raises(ConfigError, match=r"was trained on 1 columns of text, q; q, q has another number"):
        predict_rows(*args, text=("q", "q"))
