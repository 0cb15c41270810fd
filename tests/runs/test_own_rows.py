"""Runs on rows of one's own: they learn, and what they print is what `eval` prints, on the same rows and on others."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch
from tiny_kit import sentence, write_rows

import selectune as st
from selectune import tasks
from selectune.errors import CalibrationError, ConfigError, TaskError
from selectune.models.bases import load_model
from selectune.models.recorded import NONE, task_on
from selectune.models.restore import Source, evaluate_delta, verify_delta
from selectune.runs.calibration import loss_of
from selectune.runs.config import RunConfig
from selectune.runs.resume import settings_of
from selectune.runs.training import run
from selectune.tasks import OwnRows

pytest_plugins = ("tiny_fixtures",)

LABELS = {
    "classification": lambda text: "a dog" if "dog" in text.split() else "none",
    "regression": lambda text: round(len(text) / 12, 2),
    "multilabel": lambda text: [word for word in ("dog", "the", "big") if word in text.split()],
}


@pytest.fixture
def files(tmp_path):
    rng = random.Random(0)
    for name, count in (("train", 40), ("more", 20)):
        texts = [sentence(rng) for _ in range(count)]
        write_rows(tmp_path / f"{name}.jsonl", [{"q": t} | {k: make(t) for k, make in LABELS.items()} for t in texts])
    return tmp_path


@pytest.fixture
def config(tiny, files):
    return RunConfig(
        model=str(tiny), train=str(files / "train.jsonl"), validation=str(files / "more.jsonl"), text=("q",),
        label="classification", budget=100, max_steps=3, lr=5e-3, out=str(files / "out"), seed=1,
    )  # fmt: skip


@pytest.mark.parametrize("kind", LABELS)
def test_every_kind_trains_verifies_and_reproduces_its_number(config, tiny, files, kind):
    found = run(dataclasses.replace(config, label=kind))
    delta, source = found.delta, Source(str(tiny))
    assert verify_delta(source, delta).ok
    assert evaluate_delta(source, delta, task_on(None, delta.parent, NONE)) == found.evaluation
    (files / "more.jsonl").rename(files / "moved.jsonl")
    moved = dataclasses.replace(NONE, validation=str(files / "moved.jsonl"))
    assert evaluate_delta(source, delta, task_on(None, delta, moved)) == found.evaluation
    with pytest.raises(TaskError, match=r"more\.jsonl does not exist"):
        task_on(None, delta, NONE)
    assert str(files) not in json.dumps(st.load(delta).info["method"])
    recorded = st.load(delta).info["model"]
    assert recorded["problem_type"] == ("multi_label_classification" if kind == "multilabel" else None)
    assert recorded["labels"] == (None if kind == "regression" else list(task_on(None, delta, moved).labels))


def test_scores_from_data_know_rows_with_any_number_of_labels(config, tiny):
    """A softmax over labels that do not exclude each other is no probability, and a temperature divides logits."""
    several = dataclasses.replace(config, label="multilabel")
    with pytest.raises(CalibrationError, match="rows of this task have any number of labels"):
        run(dataclasses.replace(several, method="fish:labels=model,examples=4"))
    loaded = load_model(str(tiny), several.the_task.head, 1)
    rows = several.the_task.encode(loaded.tokenizer, tasks.load(several.the_task, "train").examples[:4], 32)
    batch = several.the_task.kind.collate(loaded.tokenizer, rows)
    loaded.model.eval()
    with torch.no_grad():
        outputs = loaded.model(**batch)
        assert loss_of(loaded.model, batch, 1.0 + 1e-7).item() == pytest.approx(outputs.loss.item(), abs=1e-6)
        p = torch.sigmoid(outputs.logits.double() / 200)
    wanted = -(batch["labels"] * p.log() + (1 - batch["labels"]) * (1 - p).log()).mean()
    assert loss_of(loaded.model, batch, 200.0).item() == pytest.approx(wanted.item(), abs=1e-6)


def test_a_held_out_share_and_few_rows(config, tiny):
    found = run(dataclasses.replace(config, validation=None, hold_out=0.25, train_size=10))
    assert found.origins["train"].endswith("all but a held-out share of 0.25), 10 of 30 rows (10 rows)")
    assert found.evaluation.examples == 10
    assert evaluate_delta(Source(str(tiny)), found.delta, task_on(None, found.delta, NONE)) == found.evaluation


def test_few_rows_are_measured_on_and_they_are_the_same_everywhere(config, tiny):
    few = dataclasses.replace(config, validation=None, hold_out=0.25, eval_size=4, save_every=2)
    found = run(few)
    assert found.evaluation.examples == 4
    assert found.origins["validation"].endswith("a held-out share of 0.25), 4 of 10 rows (4 rows)")
    task = task_on(None, found.delta, NONE)  # of a delta that records the digest of all ten
    assert evaluate_delta(Source(str(tiny)), found.delta, task, eval_size=4) == found.evaluation
    assert evaluate_delta(Source(str(tiny)), found.delta, task).examples == 10
    another = run(dataclasses.replace(few, seed=9, method="random", out=f"{few.out}-9"))
    assert another.evaluation.answers == found.evaluation.answers
    first = found.delta.read_bytes()
    more = run(dataclasses.replace(few, eval_size=100), resume=f"{few.out}/checkpoint-2", overwrite=True)
    assert more.evaluation.examples == 10  # there are no more
    assert more.delta.read_bytes() == first


def test_a_delta_of_a_budget_on_the_way_is_measured_on_the_rows_of_its_run(config, tiny, files, monkeypatch):
    found = run(dataclasses.replace(config, validation=None, hold_out=0.25, budget=60, checkpoint_budgets=(20,)))
    way = found.delta.parent / "budget-20"
    (row,) = found.as_json()["checkpoints"]
    for path in (way, way / "delta.safetensors"):
        assert evaluate_delta(Source(str(tiny)), way, task_on(None, path, NONE)).value == row["value"]
    monkeypatch.chdir(way)
    assert task_on(None, "delta.safetensors", NONE).label == config.label
    write_rows(files / "train.jsonl", [{"q": "the dog", "classification": name} for name in ("a dog", "none") * 8])
    with pytest.raises(TaskError, match=r"train\.jsonl has other rows than when .*budget-20"):
        task_on(None, way, NONE)


def test_rows_that_changed_are_not_measured_unasked(config, tiny, files):
    delta = run(config).delta
    write_rows(files / "more.jsonl", [{"q": "the dog", "classification": "none"}])
    with pytest.raises(TaskError, match=r"more\.jsonl has other rows than when .*out"):
        task_on(None, delta.parent, NONE)
    named = task_on(None, delta.parent, dataclasses.replace(NONE, validation=str(files / "more.jsonl")))
    assert evaluate_delta(Source(str(tiny)), delta, named).examples == 1
    write_rows(files / "more.jsonl", [{"q": "the dog", "classification": "nine"}])
    with pytest.raises(TaskError, match=r"more\.jsonl, line 1: .* 'nine', which does not occur in training"):
        task_on(None, delta, dataclasses.replace(NONE, validation=str(files / "more.jsonl")))
    (delta.parent / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"No run\.json beside .* Give them: --validation FILE"):
        task_on(None, delta, NONE)


def test_what_is_to_be_measured_is_said_once(config, files):
    rows = OwnRows(None, str(files / "more.jsonl"), ("q",), "regression")
    assert task_on(None, None, rows).kind.name == "regression"
    for name, path, given, message in (
        ("glue/rte", None, rows, "not both"),
        (None, None, NONE, "Nothing says what to measure"),
    ):
        with pytest.raises(ConfigError, match=message):
            task_on(name, path, given)


def test_the_same_rows_train_the_same_delta_wherever_they_lie(config, files):
    first = run(dataclasses.replace(config, save_every=2))
    (files / "train.jsonl").rename(files / "moved.jsonl")
    moved = dataclasses.replace(config, train=str(files / "moved.jsonl"), save_every=2)
    again = run(moved, resume=f"{config.out}/checkpoint-2", overwrite=True)
    assert again.resumed == 2
    assert again.delta.read_bytes() == first.delta.read_bytes()


BAD = [
    ({"task": "glue/rte"}, "got both"),
    ({"train": None, "validation": None, "text": (), "label": None}, "got neither"),
    ({"validation": None}, r"--validation FILE\), or hold out .* --hold-out 0\.1\)"),
    ({"hold_out": 0.1}, "not both"),
    ({"validation": None, "hold_out": 1.5}, "must be a share"),
    ({"text": ()}, "text is missing"),
    ({"kind": "regresion"}, "Did you mean regression"),
    ({"data": "here"}, "a folder of published tasks"),
    ({"train_size": 0}, "train_size=0"),
    ({"eval_size": 0}, "eval_size=0"),
    ({"train_size_seed": -1}, "train_size_seed=-1"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(row[0]) for row in BAD])
def test_settings_that_do_not_fit(config, change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **change)


def test_a_published_task_takes_no_columns(tiny):
    with pytest.raises(ConfigError, match="text: only for rows of your own"):
        RunConfig(model=str(tiny), task="glue/rte", budget=9, text=("q",))
    assert "text" not in settings_of(RunConfig(model=str(tiny), task="glue/rte", budget=9))


def test_a_size_beyond_the_rows(config):
    with pytest.raises(TaskError, match=r"41 training rows are wanted .*, and those of own are 40"):
        run(dataclasses.replace(config, train_size=41))
