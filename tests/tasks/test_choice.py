"""Multiple choice: where a choice begins, its likelihood, and the published rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lm_kit import make_llama, make_texts
from torch.nn import functional as F

from selectune import tasks
from selectune.errors import TaskError
from selectune.models.bases import load_model
from selectune.models.evaluate import evaluate
from selectune.models.restore import Source, evaluate_delta, verify_delta
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.tasks import Choice, Example
from selectune.tasks.tables.commonsense import parts_of

pytest_plugins = ("tiny_fixtures",)

PIQA = tasks.get("commonsense/piqa")
PARTIAL = tasks.get("commonsense/winogrande")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("texts"))


class Pairs:
    """A tokenizer whose tokens are pairs of letters, so that a token can lie across the border."""

    bos_token_id, eos_token_id, pad_token_id = None, 7, 0

    def __call__(self, texts, **more):
        return {"input_ids": [[hash(text[i : i + 2]) for i in range(0, len(text), 2)] for text in texts]}


def encoded(prompt, *choices, task=PIQA, length=99, label=0):
    return task.encode(Pairs(), [Example((prompt, *choices), label)], length)[0]


def test_a_choice_begins_where_the_tokens_part():
    clean = encoded("ab", "cd", "efgh")  # " cd" begins with a token of its own
    assert clean["starts"] == [1, 1]
    across = encoded("abc", "d", "ef")  # "c " lies across the border
    assert across["starts"] == [1, 1]
    assert [len(tokens) for tokens in across["choices"]] == [3, 3]
    assert encoded("ab ", "cd", "ef")["choices"] == encoded("ab", "cd", "ef")["choices"]
    assert encoded("", "ab", "cd")["choices"][0][0] == Pairs.eos_token_id
    assert encoded("ab", "cd", "efgh")["characters"] == [2, 4]
    right = encoded("ab", "cd", "efgh", label=1)
    assert (right["input_ids"], right["start"]) == (right["choices"][1], 1)


def test_what_follows_a_blank_is_scored():
    row = encoded("ab_efgh", "cd", "xy", task=PARTIAL)
    assert row["starts"] == [2, 2]
    assert row["choices"][0][2:] == row["choices"][1][2:]
    assert row["choices"][0][:2] != row["choices"][1][:2]


def test_long_texts_lose_their_start_and_choices_are_whole(caplog):
    row = encoded("abcdefgh", "ij", length=4)
    assert (len(row["input_ids"]), row["start"]) == (4, 2)
    assert "1 of 1 texts of commonsense/piqa lose their start" in caplog.text
    with pytest.raises(TaskError, match=r"has 3 tokens and needs one before it, which is more than max_length=2"):
        encoded("ab", "cdefgh"[:5], length=2)


def test_only_the_right_choice_is_trained_on(llama):
    tokenizer = load_model(str(llama), PIQA.head, 0).tokenizer
    rows = PIQA.encode(tokenizer, [Example(("find the dog", "cat", "dog sleeps"), 1), Example(("a", "b", "c"), 0)], 32)
    batch = PIQA.kind.collate(tokenizer, rows)
    assert (batch["labels"] != -100).sum(-1).tolist() == [2, 1]
    assert torch.equal(batch["labels"][0, -2:], batch["input_ids"][0, -2:])


def test_likelihoods_are_the_direct_ones(llama, texts):
    loaded = load_model(str(llama), PIQA.head, 0)
    rows = PIQA.encode(loaded.tokenizer, tasks.load(PIQA, "validation", texts).examples, 32)
    right = normalised = 0
    with torch.no_grad():
        found = PIQA.kind.predict(PIQA, loaded.model, loaded.tokenizer, rows)
        for row, choices in zip(rows, found, strict=True):
            totals = []
            for tokens, start in zip(row["choices"], row["starts"], strict=True):
                ids = torch.tensor([tokens])
                logits = loaded.model(ids).logits[0, start - 1 : -1].double()
                totals.append(-F.cross_entropy(logits, ids[0, start:], reduction="sum").item())
            assert [total for total, _ in choices] == pytest.approx(totals, rel=1e-6)
            means = [total / length for total, length in zip(totals, row["characters"], strict=True)]
            right += totals.index(max(totals)) == row["answer"]
            normalised += means.index(max(means)) == row["answer"]
    measured = evaluate(loaded.model, loaded.tokenizer, PIQA, rows)
    assert measured.value == right / len(rows)
    assert measured.others == {"accuracy_normalised": normalised / len(rows)}


def test_a_run_reproduces_its_accuracy(llama, texts, tmp_path):
    config = RunConfig(model=str(llama), task=PIQA.name, budget=400, max_steps=5, lr=1e-2, data=str(texts),
                       out=str(tmp_path / "out"))  # fmt: skip
    found = run(config)
    assert set(found.evaluation.others) == {"accuracy_normalised"}
    assert evaluate_delta(Source(str(llama)), found.delta, PIQA, str(texts)) == found.evaluation
    report = verify_delta(Source(str(llama)), found.delta)
    assert report.ok, report.problem
    assert found.verification.changed > 0


BAD = [
    ({"prompt": "a", "choices": ["b", "c"]}, "needs prompt, choices, label; missing: label"),
    ({"prompt": "a", "choices": "bc", "label": 0}, "must be a string and choices a list of strings"),
    ({"prompt": 3, "choices": ["b", "c"], "label": 0}, "must be a string"),
    ({"prompt": "a", "choices": ["b"], "label": 0}, "two choices or more"),
    ({"prompt": "a", "choices": ["b", " "], "label": 0}, "none of them empty"),
    ({"prompt": "a", "choices": ["b", "c"], "label": 2}, "must be 0 to 1, got 2"),
    ({"prompt": "a", "choices": ["b", "c"], "label": True}, "must be 0 to 1, got True"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows(row, message):
    task = dataclasses.replace(PIQA, prepare=None, generate=lambda split: [row])
    with pytest.raises(TaskError, match=message):
        tasks.load(task, "train")


def test_a_blank_is_needed():
    row = {"prompt": "no blank", "choices": ["b", "c"], "label": 0}
    task = dataclasses.replace(PIQA, kind=Choice(partial=True), prepare=None, generate=lambda split: [row])
    with pytest.raises(TaskError, match="needs one blank, _, and text after it"):
        tasks.load(task, "train")


def test_rows_in_the_form_of_llm_adapters():
    text = "Please choose the correct answer to the question: Why: x?\n\nAnswer1: a Answer2: b c\n\nAnswer format: "
    row = {"instruction": text + "answer1/answer2", "answer": "answer1"}
    assert parts_of(row) == ("Why: x?", ["a", "b c"], 0)
    for broken in ({**row, "answer": "answer3"}, {**row, "instruction": "Answer format: answer1/answer2"}, {}):
        task = dataclasses.replace(PIQA, generate=lambda split, broken=broken: [broken])
        with pytest.raises(TaskError, match="not a row of commonsense/piqa"):
            tasks.load(task, "train")


def test_hellaswag_is_cleaned():
    row = {"activity_label": "Roof", "ctx_a": "A man [header] sits.", "ctx_b": "he", "endings": ["is [step] up.", "b"],
           "label": "1"}  # fmt: skip
    task = dataclasses.replace(tasks.get("commonsense/hellaswag"), generate=lambda split: [row])
    assert tasks.load(task, "train").examples[0] == Example(("Roof: A man sits. He", "is up.", "b"), 1)


SETS = {"boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "winogrande": 1267, "arc_easy": 2376, "arc_challenge": 1172,
        "openbookqa": 500}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_the_benchmark_data_and_the_chance_levels(name, real_data):
    task = tasks.get(f"commonsense/{name}")
    rows = tasks.load(task, "validation", real_data).examples
    assert len(rows) == SETS[name]
    labels = [row.label for row in rows]
    assert max(map(labels.count, set(labels))) / len(rows) == task.chance
