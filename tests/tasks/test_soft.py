"""Soft labels against their formulas in plain Python, the rows that a set grows by, and files of them."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from tiny_kit import write_rows

from selectune import tasks
from selectune.errors import ConfigError, TaskError
from selectune.tasks import Cloze, Example
from selectune.tasks.kinds.classify import Distilled
from selectune.tasks.soft import counts_of

RTE = tasks.get("glue/rte")
SAID = ("small", "big")
P = some.floats(0.01, 0.99)


@given(some.lists(some.tuples(P, P), min_size=1, max_size=4), some.floats(0.5, 5), some.data())
def test_soft_labels_are_the_softmax_of_weighted_logits(rows, temperature, drawn):
    """The oracle goes the paper's way: over logits, which have any constant of their row on them."""
    members = drawn.draw(some.integers(1, 4))
    weights = [drawn.draw(some.floats(0.1, 1)) for _ in range(members)]
    p = [[[drawn.draw(P) for _ in range(3)] for _ in rows] for _ in range(members)]
    p = [[[each / sum(row) for each in row] for row in member] for member in p]
    found = tasks.soft_labels(torch.tensor(p, dtype=torch.float64), weights, temperature).tolist()
    for r in range(len(rows)):
        logits = [[math.log(each) + 7 * m - r for each in p[m][r]] for m in range(members)]
        mean = [sum(w * row[c] for w, row in zip(weights, logits, strict=True)) / sum(weights) for c in range(3)]
        powers = [math.exp(score / temperature) for score in mean]
        assert found[r] == pytest.approx([power / sum(powers) for power in powers], rel=1e-9)


def test_a_probability_of_nothing_and_weights_of_nothing_are_taken():
    p = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    found = tasks.soft_labels(p, [0.0, 0.0], temperature=1.0)
    assert found.tolist() == tasks.soft_labels(p, [1.0, 1.0], temperature=1.0).tolist()
    assert found[0, 1] == pytest.approx(1e-15, rel=1e-6)
    assert tasks.soft_labels(p, [0.0, 1.0]).tolist() == [[0.5, 0.5]]


@given(some.lists(some.integers(0, 99), min_size=1, max_size=40), some.integers(0, 4), some.integers(0, 4),
       some.integers(2, 5))  # fmt: skip
def test_a_set_grows_by_the_surest_rows_in_its_own_shares(sure, first, second, factor):
    q = torch.tensor([[0.99 - s / 100, 0.01 + s / 100] for s in sure], dtype=torch.float64)
    found = tasks.surest(q, [first, second], factor)
    assert len(set(found)) == len(found)
    for label, count in enumerate((first, second)):
        mine = [i for i in range(len(sure)) if int(q[i].argmax()) == label]
        chosen = [row for row, said in found if said == label]
        assert len(chosen) == min(len(mine), (factor - 1) * count)
        assert set(chosen) <= set(mine)
        left = [float(q[i, label]) for i in set(mine) - set(chosen)]
        assert not left or not chosen or max(left) <= min(float(q[i, label]) for i in chosen)


def test_a_set_of_ten_becomes_fifty():
    q = torch.linspace(0.0, 1.0, 200, dtype=torch.float64)
    found = tasks.surest(torch.stack([q, 1 - q], 1), [6, 4], 5)
    assert [sum(label == c for _, label in found) for c in (0, 1)] == [24, 16]
    assert [row for row, _ in found] == [*range(16), *range(176, 200)]


def test_the_loss_is_the_cross_entropy_with_the_probabilities():
    logits, q = torch.randn(4, 2), torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    p = logits.double().softmax(-1)
    wanted = float(-(q * p.log()).sum() / 4)
    kind = Distilled()
    assert kind.loss(SimpleNamespace(logits=logits), q).item() == pytest.approx(wanted, rel=1e-5)
    parts = [kind.loss(SimpleNamespace(logits=logits[a:b]), q[a:b], q.numel()) for a, b in ((0, 1), (1, 4))]
    assert float(sum(parts)) == pytest.approx(wanted, rel=1e-5)

    cloze, whole = Cloze(pattern="{} {}", words=SAID), torch.randn(4, 3, 9)
    whole[:, 1, [4, 7]] = logits
    labels = torch.cat([torch.tensor([[1.0, 4.0, 7.0]] * 4), q], 1)
    assert cloze.loss(SimpleNamespace(logits=whole), labels).item() == pytest.approx(wanted, rel=1e-5)
    hard = torch.tensor([[1, 4, 7, int(row.argmax())] for row in q])
    one = torch.cat([labels[:, :3], torch.nn.functional.one_hot(hard[:, 3], 2).float()], 1)
    outputs = SimpleNamespace(logits=whole)
    assert cloze.loss(outputs, one).item() == pytest.approx(cloze.loss(outputs, hard).item(), rel=1e-5)


def test_rows_are_read_as_they_are_written(tmp_path):
    rows = [Example(("a", "b"), [0.25, 0.75]), Example(("c", "d"), 1), Example(("e", "f"), [0.9, 0.1])]
    tasks.write_soft(RTE, rows, tmp_path / "rows.jsonl")
    found = tasks.read_soft(RTE, str(tmp_path / "rows.jsonl"))
    assert found.examples == (rows[0], Example(("c", "d"), [0.0, 1.0]), rows[2])
    first = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert first["prediction"]["label"] == "not_entailment"
    assert counts_of(RTE, [Example(("a", "b"), 1), Example(("a", "b"), 1)]) == [0, 2]


@pytest.mark.parametrize(
    ("prediction", "why"),
    [
        (None, "must have 'probabilities' of the labels of glue/rte, entailment, not_entailment"),
        ("entailment", "must have 'probabilities'"),
        ({"label": "entailment"}, "must have 'probabilities'"),
        ({"probabilities": {"entailment": 1.0}}, "must have 'probabilities'"),
        ({"probabilities": {"entailment": 0.9, "not_entailment": 0.2}}, "add up to 1"),
        ({"probabilities": {"entailment": 1.5, "not_entailment": -0.5}}, "from 0 to 1"),
        ({"probabilities": {"entailment": True, "not_entailment": False}}, "from 0 to 1"),
        ({"probabilities": {"entailment": "1", "not_entailment": 0}}, "from 0 to 1"),
    ],
)
def test_rows_without_probabilities_are_told(prediction, why, tmp_path):
    row = {"sentence1": "a", "sentence2": "b", "prediction": prediction}
    write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(TaskError, match="line 1: ") as told:
        tasks.read_soft(RTE, str(tmp_path / "rows.jsonl"))
    assert why in str(told.value)


def test_other_faults_are_told(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(TaskError, match="has no rows"):
        tasks.read_soft(RTE, str(tmp_path / "none.jsonl"))
    write_rows(tmp_path / "rows.jsonl", [{"sentence1": 3, "sentence2": "b", "prediction": {}}])
    with pytest.raises(TaskError, match="line 1: the texts of glue/rte must be strings"):
        tasks.read_soft(RTE, str(tmp_path / "rows.jsonl"))
    with pytest.raises(ConfigError, match="glue/stsb is a regression"):
        tasks.with_soft_labels(tasks.get("glue/stsb"))
