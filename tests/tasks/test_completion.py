"""Completion: what is learned, what is cut, and that a row's answer does not depend on the rows beside it."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from text_kit import SUMS, make_llama
from tiny_kit import write_rows

from selectune import tasks
from selectune.errors import TaskError
from selectune.models.restore import Source, evaluate_delta, verify_delta
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.tasks import ANSWER, Completion, CompletionLoss, Example
from selectune.tasks.tables.problems import SOLVING

TASK = tasks.get("math/gsm8k")
TEMPLATE = (
    "{% for turn in messages %}<s>{{ turn.role }} {{ turn.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        write_rows(folder / f"math/gsm8k/{split}.jsonl", SUMS)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory, data):
    known = [text for e in tasks.load(TASK, "train", data).examples for text in (*e.texts, e.label)]
    plain = SOLVING.plain.format("")
    return make_llama(tmp_path_factory.mktemp("models") / "llama", [plain, *known, "assistant user"])


@pytest.fixture(scope="module")
def loaded(llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(llama)


def encoded(tokenizer, texts, kind=SOLVING, length=64):
    task = dataclasses.replace(TASK, kind=kind)
    return task.encode(tokenizer, [Example((text,), "There are 7 pens.") for text in texts], length)


def test_the_loss_is_on_the_completion_and_the_end_of_text(loaded):
    model, tokenizer = loaded
    rows = encoded(tokenizer, ["Ann has 3 pens and finds 4 more.", "Ann has 3"])
    batch = SOLVING.collate(tokenizer, rows)
    for i, text in enumerate(["Ann has 3 pens and finds 4 more.", "Ann has 3"]):
        prompt = tokenizer(SOLVING.plain.format(text))["input_ids"]
        end = [*tokenizer("There are 7 pens.", add_special_tokens=False)["input_ids"], 3]
        pads = batch["input_ids"].shape[1] - len(prompt) - len(end)
        assert prompt[0] == 2
        assert batch["input_ids"][i].tolist() == [*prompt, *end, *[0] * pads]
        assert batch["labels"][i].tolist() == [*[-100] * len(prompt), *end, *[-100] * pads]
        assert batch["attention_mask"][i].tolist() == [1] * (len(prompt) + len(end)) + [0] * pads
    whole = model(**batch).loss.item()
    kind = CompletionLoss(plain=SOLVING.plain)
    task = dataclasses.replace(TASK, kind=kind)
    rows = encoded(tokenizer, ["Ann has 3 pens and finds 4 more.", "Ann has 3"], kind)
    with torch.no_grad():
        found = kind.predict(task, model, tokenizer, rows)
    assert [row[ANSWER] for row in rows] == [5, 5]
    assert math.isclose(sum(found) / 10, whole, rel_tol=1e-6)  # kept in float32


def test_a_chat_template_is_used_where_there_is_one(loaded):
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.chat_template = TEMPLATE
    (row,) = encoded(tokenizer, ["Ann has 3"], dataclasses.replace(SOLVING, prompt="How many {}"))
    assert tokenizer.decode(row["input_ids"]) == "<s> user How many Ann has 3 assistant"
    (row,) = encoded(tokenizer, ["Ann has 3"], dataclasses.replace(SOLVING, chat=False))
    assert tokenizer.decode(row["input_ids"]).startswith("<s> ### Instruction: Ann has 3 ")


def test_several_texts_are_lines_or_fill_the_prompt(loaded):
    kind, tokenizer = Completion(), loaded[1]
    task = dataclasses.replace(TASK, kind=kind, fields=("a", "b"))
    (row,) = task.encode(tokenizer, [Example(("Ann", "Ben"), ("pens", "cups"))], 20)
    assert tokenizer.decode(row["input_ids"]) == "<s> Ann Ben"
    assert (row["completion"], row[ANSWER]) == ([*tokenizer.convert_tokens_to_ids(["pens"]), 3], ["pens", "cups"])


def test_a_prompt_loses_its_beginning_and_never_the_completion(loaded, caplog):
    tokenizer = loaded[1]
    text = " ".join(["Ann has 3 pens"] * 5)
    with caplog.at_level(logging.WARNING, logger="selectune"):
        rows = encoded(tokenizer, [text, "Ann"], Completion(), 12)
    assert caplog.messages[-1].startswith("1 of 2 prompts of math/gsm8k lose their beginning: prompt and completion")
    batch = Completion().collate(tokenizer, rows)
    assert batch["input_ids"].shape == (2, 12)
    assert tokenizer.decode(batch["input_ids"][0]) == "<s> 3 pens Ann has 3 pens There are 7 pens. </s>"
    assert len(rows[0]["input_ids"]) == 12  # to generate from
    assert rows[0]["input_ids"][0] == 2
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="selectune"):
        (row,) = encoded(tokenizer, ["Ann"], Completion(), 4)
    assert "1 of 1 completions of math/gsm8k lose their end" in caplog.text
    assert row["completion"] == tokenizer("There are 7", add_special_tokens=False)["input_ids"]
    with pytest.raises(TaskError, match="max_length=1 leaves math/gsm8k no place"):
        encoded(tokenizer, ["Ann"], Completion(), 1)


def greedy(model, ids, count):
    """The likeliest token at each step: without a cache, without padding, alone."""
    ids, found = list(ids), []
    for _ in range(count):
        found.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if found[-1] == 3:
            break
        ids.append(found[-1])
    return found


PROMPTS = [
    "Ann",
    "Ben has 10 cups and finds 2 more. How many cups are there?",
    "Cleo has 7 hats",
    "Dan has 21 eggs and",
]


def test_an_answer_is_that_of_a_row_alone(loaded):
    """In float64 the last bits of a padded batch cannot turn a random model's choice."""
    model, tokenizer = loaded
    kind = dataclasses.replace(SOLVING, max_new_tokens=12)
    rows = encoded(tokenizer, PROMPTS, kind)
    before = (tokenizer.padding_side, tokenizer.pad_token_id, copy.deepcopy(model.generation_config.to_dict()))
    with torch.no_grad():
        together = kind.predict(TASK, model, tokenizer, rows)
        assert together == [kind.predict(TASK, model, tokenizer, [row])[0] for row in rows]
        for row, text in zip(rows, together, strict=True):
            assert text == tokenizer.decode(greedy(model, row["input_ids"], 12), skip_special_tokens=True).strip()
        beams = dataclasses.replace(kind, beams=3)
        searched = beams.predict(TASK, model, tokenizer, rows)
        assert searched == [beams.predict(TASK, model, tokenizer, [row])[0] for row in rows]
    assert searched != together
    assert len(set(together)) > 1
    assert (tokenizer.padding_side, tokenizer.pad_token_id, model.generation_config.to_dict()) == before


def test_what_a_model_brings_along_does_not_change_answers(loaded):
    model, tokenizer = loaded
    kind = dataclasses.replace(SOLVING, max_new_tokens=12)
    rows = encoded(tokenizer, PROMPTS, kind)
    with torch.no_grad():
        plain = kind.predict(TASK, model, tokenizer, rows)
        other = copy.deepcopy(model)
        other.generation_config.update(do_sample=True, temperature=5.0, top_k=2, repetition_penalty=3.0, min_length=9,
                                       num_beams=4, no_repeat_ngram_size=1, max_length=15)  # fmt: skip
        assert kind.predict(TASK, other, tokenizer, rows) == plain


def test_prompt_and_answer_fit_the_model(loaded, caplog):
    model, tokenizer = loaded
    kind = dataclasses.replace(SOLVING, max_new_tokens=314)
    rows = encoded(tokenizer, PROMPTS, kind)
    with caplog.at_level(logging.WARNING, logger="selectune"), torch.no_grad():
        kind.predict(TASK, model, tokenizer, rows)
    assert (
        "prompts of math/gsm8k lose their beginning: the model has 320 positions, and 314 are for answers"
        in caplog.text
    )
    apart = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=127, is_encoder_decoder=True))
    with pytest.raises(TaskError, match="up to 128 tokens, and this model has 127 positions, which are too few"):
        tasks.get("summarization/dialogsum").fits(apart)
    apart.config.max_position_embeddings = 128
    tasks.get("summarization/dialogsum").fits(apart)
    with pytest.raises(TaskError, match="up to 320 tokens, and this model has 320 positions"):
        dataclasses.replace(kind, max_new_tokens=320).predict(TASK, model, tokenizer, rows)


@pytest.mark.parametrize("name", ["math/gsm8k", "math/gsm8k-loss"])
def test_a_model_with_too_few_positions_is_refused_before_training(llama, data, tmp_path, name):
    small = tmp_path / "small"
    shutil.copytree(llama, small)
    told = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(told | {"max_position_embeddings": 64}))
    config = RunConfig(model=str(small), task=name, budget=50, max_steps=1, data=str(data), out=str(tmp_path / "out"))
    if name == "math/gsm8k-loss":
        assert run(config).steps == 1
        return
    with pytest.raises(TaskError, match="this model has 64 positions, which leaves none for a prompt"):
        run(config)
    assert not (tmp_path / "out/delta.safetensors").exists()
    with pytest.raises(TaskError, match="this model has 64 positions, which leaves none for a prompt"):
        evaluate_delta(Source(str(small)), None, TASK, str(data))


def test_a_tokenizer_without_an_end_of_text_is_refused(loaded):
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.eos_token = None
    with pytest.raises(TaskError, match=r"math/gsm8k needs a tokenizer with an end of text \(eos_token\)"):
        encoded(tokenizer, ["Ann"])


def test_a_tiny_llama_learns_eight_rows_by_heart(llama, data, tmp_path):
    config = RunConfig(model=str(llama), task=TASK.name, method="full", lr=1e-2, max_steps=60, batch_size=8,
                       data=str(data), out=str(tmp_path / "full"))  # fmt: skip
    result = run(config)
    assert result.evaluation.metric == "accuracy_lenient"
    assert (result.value, dict(result.evaluation.others)) == (1.0, {"accuracy_strict": 1.0})
    assert evaluate_delta(Source(str(llama)), result.delta, TASK, str(data)) == result.evaluation
    assert verify_delta(Source(str(llama)), result.delta).ok


@pytest.mark.parametrize("name", ["math/gsm8k", "math/gsm8k-loss"])
def test_a_selection_gives_its_metric_again(llama, data, tmp_path, name):
    config = RunConfig(model=str(llama), task=name, budget=500, lr=1e-2, max_steps=8, batch_size=4, data=str(data),
                       eval_every=4, out=str(tmp_path / "id3"))  # fmt: skip
    result = run(config)
    assert 0 < result.verification.changed <= 500
    assert evaluate_delta(Source(str(llama)), result.delta, tasks.get(name), str(data)) == result.evaluation
    assert verify_delta(Source(str(llama)), result.delta).ok
    if name == "math/gsm8k-loss":
        assert 1 < result.value < 128
