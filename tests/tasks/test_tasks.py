"""Tasks: the registry, rows from folders, and the errors for missing ones."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import random

import pytest
from tiny_kit import write_rows

from selectune import tasks
from selectune.errors import TaskError
from selectune.tasks import DATA, TASKS, Example

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv(DATA, raising=False)


EXPECTED = {  # name: metric, labels, epochs, eval every (methods of the papers)
    "glue/cola": ("Matthews correlation", 2, 20, 200),
    "glue/mrpc": ("accuracy", 2, 30, 100),
    "glue/rte": ("accuracy", 2, 30, 100),
    "glue/stsb": ("mean of Pearson and Spearman", 0, 15, 200),
    "glue/sst2": ("accuracy", 2, 7, 500),
    "glue/qnli": ("accuracy", 2, 7, 1000),
    "glue/qqp": ("accuracy", 2, 3, 4000),
    "glue/mnli": ("accuracy", 3, 3, 4000),
    "glue/mnli-mm": ("accuracy", 3, 3, 4000),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_glue_is_as_in_the_papers(name):
    task = tasks.get(name)
    assert (task.metric_name, len(task.labels), task.epochs, task.eval_every) == EXPECTED[name]
    assert task.max_length == 256
    assert task.head.num_labels == max(1, len(task.labels))
    assert task.hub is not None
    assert len(task.hub.revision) == 40


def test_every_task_is_complete():
    for name, task in TASKS.items():
        assert name == task.name
        assert task.source
        assert (task.kind.name in ("classification", "tagging")) == bool(task.labels)
        assert 0 <= task.chance < 1 if task.chance is not None else task.lower_is_better
        assert task.generate or task.hub or task.folders or task.parts


def test_unknown_names():
    with pytest.raises(TaskError, match=r"Unknown task 'glue/rtee'\. Known: glue/cola, .*demo/topic"):
        tasks.get("glue/rtee")
    with pytest.raises(TaskError, match=r"Unknown split 'test' of glue/rte\. Known: train, validation"):
        tasks.load(tasks.get("glue/rte"), "test")


def test_rows_come_from_a_folder_packed_or_not(data):
    packed = tasks.load(tasks.get("glue/rte"), "train", data)
    assert len(packed) == 48
    assert packed.origin.endswith("train.jsonl.gz")
    plain = tasks.load(tasks.get("glue/stsb"), "validation", data, limit=5)
    assert len(plain) == 5
    assert all(isinstance(example.label, float) and len(example.texts) == 2 for example in plain.examples)


def test_the_variable_names_the_folder(data, monkeypatch):
    monkeypatch.setenv(DATA, str(data))
    assert len(tasks.load(tasks.get("glue/cola"), "train")) == 48


def test_mnli_is_looked_for_in_both_places(tmp_path):
    row = {"premise": "a", "hypothesis": "b", "label": 2}
    write_rows(tmp_path / "nli/mnli/validation_matched.jsonl", [row], packed=True)
    write_rows(tmp_path / "glue/mnli/validation_mismatched.jsonl", [row, row])
    assert tasks.load(tasks.get("glue/mnli"), "validation", tmp_path).examples == (Example(("a", "b"), 2),)
    assert len(tasks.load(tasks.get("glue/mnli-mm"), "validation", tmp_path)) == 2


def test_a_named_folder_without_the_task_is_an_error_and_not_a_reason_to_ask_the_hub(data, tmp_path):
    with pytest.raises(TaskError, match=r"has no train split of glue/qqp; looked for .*glue/qqp/train\.jsonl"):
        tasks.load(tasks.get("glue/qqp"), "train", data)
    with pytest.raises(TaskError, match="does not exist"):
        tasks.load(tasks.get("glue/rte"), "train", tmp_path / "nowhere")
    (tmp_path / "file").write_text("{}")
    with pytest.raises(TaskError, match="file is no folder"):
        tasks.load(tasks.get("glue/rte"), "train", tmp_path / "file")
    write_rows(tmp_path / "glue/qnli/validation.jsonl", [{"question": "a", "sentence": "b", "label": 0}])
    with pytest.raises(TaskError, match=r"There is validation\.jsonl"):
        tasks.load(tasks.get("glue/qnli"), "train", tmp_path)


def test_offline_the_hub_is_not_reached_and_the_message_says_what_would_help(data, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(TaskError, match=rf"{DATA} is not set, and hub nyu-mll/glue/qqp@\w+ cannot be reached.*--data"):
        tasks.load(tasks.get("glue/qqp"), "train")
    monkeypatch.setenv(DATA, str(data))
    with pytest.raises(TaskError, match=r"looked for .*glue/qqp/train\.jsonl"):
        tasks.load(tasks.get("glue/qqp"), "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sentence": "a", "label": 0}\n{"sentence": "b"\n', r"train\.jsonl, line 2 is not valid JSON"),
        ('{"sentence": "a"}\n', r"line 1: a row of glue/cola needs sentence, label; missing: label"),
        ('{"sentence": 3, "label": 0}\n', "must be strings"),
        ('{"sentence": "a", "label": "0"}\n', "must be a number, got '0'"),
        ('{"sentence": "a", "label": -1}\n', r"must be 0 to 1 \(unacceptable, acceptable\), got -1"),
        ('{"sentence": "a", "label": 0.5}\n', "must be 0 to 1"),
        ('{"sentence": "a", "label": true}\n', "must be a number, got True"),
        ('{"sentence": "a", "label": NaN}\n', r"line 1 is not valid JSON: NaN is not a number that JSON allows\.$"),
        ('{"sentence": "a", "label": 1e999}\n', "line 1 is not valid JSON"),
        ('{"sentence": "\\ud800", "label": 0}\n', "line 1 holds half of a surrogate pair"),
        ("[1, 2]\n", "expected one JSON object a line"),
        ("\n", "has no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path, text, message):
    path = tmp_path / "glue/cola/train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match=message):
        tasks.load(tasks.get("glue/cola"), "train", tmp_path)


def test_a_class_may_be_written_as_a_float(tmp_path):
    """Tables with gaps hold whole numbers as floats; 1.0 is read as the label 1."""
    write_rows(tmp_path / "glue/cola/train.jsonl", [{"sentence": "a", "label": 1.0}, {"sentence": "b", "label": 0}])
    found = tasks.load(tasks.get("glue/cola"), "train", tmp_path)
    assert [example.label for example in found.examples] == [1, 0]
    assert all(type(example.label) is int for example in found.examples)


@pytest.mark.parametrize("label", [float("nan"), float("inf"), 1e16, -(10**400)])
def test_a_label_is_finite_wherever_it_comes_from(label):
    """A run would only be lost where its metric is computed."""
    task = dataclasses.replace(
        tasks.get("glue/stsb"), generate=lambda split: [{"sentence1": "a", "sentence2": "b", "label": label}]
    )
    with pytest.raises(
        TaskError, match=r"row 1: the label of glue/stsb must be (finite|at most 1e\+15), got .{1,80}\.$"
    ):
        tasks.load(task, "train")


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "glue/cola/train.jsonl.gz"
    path.parent.mkdir(parents=True)
    row = json.dumps({"sentence": "a " * 500, "label": 1}) + "\n"
    path.write_bytes(gzip.compress((row * 50).encode())[:-20])
    with pytest.raises(TaskError, match="cannot be read"):
        tasks.load(tasks.get("glue/cola"), "train", tmp_path)


def test_the_benchmark_data_has_the_published_rows(real_data):
    sizes = {"cola": (8551, 1043), "sst2": (67349, 872), "rte": (2490, 194), "stsb": (5749, 1500)}
    for name, (train, validation) in sizes.items():
        task = tasks.get(f"glue/{name}")
        assert len(tasks.load(task, "train", real_data)) == train
        assert len(tasks.load(task, "validation", real_data)) == validation
    assert len(tasks.load(tasks.get("glue/mnli"), "validation", real_data)) == 9815


@pytest.mark.parametrize("packed", [False, True])
def test_mutants_of_a_data_file(packed, tmp_path, tries):
    """Each is refused with the file's name, or its rows are texts and finite labels of the task."""
    rows = [{"sentence1": f"a {n}", "sentence2": "b", "label": n / 2, "idx": n} for n in range(9)]
    file = tmp_path / "glue/stsb/train.jsonl"
    write_rows(file, rows, packed=packed)
    file = file.with_name(file.name + ".gz") if packed else file
    whole, draw, refused = file.read_bytes(), random.Random(3), 0
    values = (
        b"NaN",
        b"1e400",
        b"-1e16",
        b"9" * 5000,
        b"null",
        b"[1]",
        b'"\\ud800"',
        b"\0",
        b"\xff",
        b"",
        b"}",
        b"true",
    )
    tries(300)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 3))):
            at = draw.randrange(len(data) + 1)
            data[at : at + draw.randrange(4)] = draw.choice(values)
        file.write_bytes(data)
        try:
            found = tasks.load(tasks.get("glue/stsb"), "train", tmp_path)
        except TaskError as error:
            refused += str(file) in str(error)
        else:
            assert all(math.isfinite(example.label) for example in found.examples)
            "".join(text for example in found.examples for text in example.texts).encode()
            refused -= packed and found.examples != tuple(
                Example((row["sentence1"], row["sentence2"]), row["label"]) for row in rows
            )
    assert refused > 200
