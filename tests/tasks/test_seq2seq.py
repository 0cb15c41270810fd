"""Text to text: sources and targets, references, and a run whose ROUGE comes back."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
from text_kit import DIALOGUES, make_t5
from tiny_kit import write_rows

from selectune import tasks
from selectune.errors import TaskError
from selectune.models.restore import Source, evaluate_delta, verify_delta
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.tasks import ANSWER, Example, Seq2Seq

TASK = tasks.get("summarization/dialogsum")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return make_t5(tmp_path_factory.mktemp("models") / "t5", [text for row in DIALOGUES for text in row.values()])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """As in the published data, the test split alone has several references."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "summarization/dialogsum/train.jsonl", DIALOGUES)
    several = [{**row, "summaries": [row["summary"], "Nothing is said."]} for row in DIALOGUES]
    several = [{key: row[key] for key in ("dialogue", "summaries")} for row in several]
    write_rows(folder / "summarization/dialogsum/test.jsonl", several)
    return folder


@pytest.fixture(scope="module")
def loaded(t5):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    return AutoModelForSeq2SeqLM.from_pretrained(t5, dtype=torch.float64).eval(), AutoTokenizer.from_pretrained(t5)


def test_rows_have_one_reference_or_several(data):
    assert tasks.load(TASK, "train", data).examples[0].label == DIALOGUES[0]["summary"]
    assert tasks.load(TASK, "validation", data).examples[0].label == (DIALOGUES[0]["summary"], "Nothing is said.")


def test_targets_are_the_labels_and_both_are_cut_at_their_ends(loaded, caplog):
    tokenizer = loaded[1]
    task = dataclasses.replace(TASK, kind=Seq2Seq(target_length=4))
    examples = [Example(("the key I left",), "in the hall"), Example(("the",), "key left in the car")]
    with caplog.at_level(logging.WARNING, logger="selectune"):
        rows = task.encode(tokenizer, examples, 3)
    assert caplog.messages[-2:] == [
        "1 of 2 sources of summarization/dialogsum are longer than 3 tokens and lose their ends.",
        "1 of 2 targets of summarization/dialogsum are longer than 4 tokens and lose their ends.",
    ]
    assert tokenizer.batch_decode([row["input_ids"] for row in rows]) == ["the key </s>", "the </s>"]
    batch = task.kind.collate(tokenizer, rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert tokenizer.batch_decode(batch["labels"]) == ["in the <unk> </s>", "key left in </s>"]
    short = task.encode(tokenizer, [Example(("the",), "the"), Example(("the",), "the car")], 3)
    assert task.kind.collate(tokenizer, short)["labels"][0].tolist()[-1] == -100
    assert short[0][ANSWER] == "the"


def test_the_prefix_is_for_the_tokenizers_of_t5(loaded):
    from transformers import PreTrainedTokenizerFast

    class T5Like(PreTrainedTokenizerFast):
        pass

    T5Like.__name__ = "T5TokenizerFast"
    plain = loaded[1]
    known = T5Like(tokenizer_object=plain.backend_tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    task = dataclasses.replace(TASK, kind=Seq2Seq(prefix="the key "))
    lengths = [len(task.encode(each, [Example(("I",), "I")], 9)[0]["input_ids"]) for each in (plain, known)]
    assert lengths == [2, 4]


def test_an_answer_is_that_of_a_row_alone(loaded):
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    torch.manual_seed(1)
    for name, weight in model.named_parameters():  # as T5 draws them, all answers are empty
        if "norm" not in name:
            weight.data.normal_(std=0.5)
    kind = Seq2Seq(max_new_tokens=10)
    texts = [row["dialogue"][: 12 + 9 * i] for i, row in enumerate(DIALOGUES)]
    rows = TASK.encode(tokenizer, [Example((text,), "I") for text in texts], 64)
    with torch.no_grad():
        for each in (kind, dataclasses.replace(kind, beams=3)):
            together = each.predict(TASK, model, tokenizer, rows)
            assert together == [each.predict(TASK, model, tokenizer, [row])[0] for row in rows]
            assert len(set(together)) > 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"dialogue": "a", "summary": " "},
            "line 1: the label of .* must be a text, or a list of texts, none of them empty",
        ),
        ({"dialogue": "a", "summaries": []}, "line 1: .*must be a text"),
        ({"dialogue": "a", "summaries": ["b", 1]}, "line 1: .*must be a text"),
        ({"dialogue": "\n", "summary": "b"}, "line 1: there is no text in dialogue of summarization/dialogsum"),
        ({"dialogue": 3, "summary": "b"}, "line 1: the texts of .* must be strings"),
        ({"dialogue": "a"}, "line 1: not a row of summarization/dialogsum"),
        ({"summary": "b"}, "line 1: .*missing: dialogue"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    write_rows(tmp_path / "summarization/dialogsum/train.jsonl", [row])
    with pytest.raises(TaskError, match=r"train\.jsonl, " + message):
        tasks.load(TASK, "train", tmp_path)


def test_a_tiny_t5_learns_eight_rows_by_heart(t5, data, tmp_path):
    config = RunConfig(model=str(t5), task=TASK.name, method="full", lr=1e-2, max_steps=120, batch_size=8,
                       data=str(data), out=str(tmp_path / "full"))  # fmt: skip
    result = run(config)
    assert result.value > 0.9
    assert set(result.evaluation.others) == {"rouge1", "rouge2"}
    assert evaluate_delta(Source(str(t5)), result.delta, TASK, str(data)) == result.evaluation
    assert verify_delta(Source(str(t5)), result.delta).ok
    sparse = dataclasses.replace(config, method="id3", budget=500, max_steps=5, out=str(tmp_path / "id3"))
    found = run(sparse)
    assert evaluate_delta(Source(str(t5)), found.delta, TASK, str(data)) == found.evaluation
