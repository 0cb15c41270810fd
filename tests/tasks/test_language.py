"""Language modelling: every token is predicted once, and perplexity is what plain torch computes from whole logits."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from lm_kit import make_llama, make_texts
from torch.nn import functional as F

import selectune as st
from selectune import tasks
from selectune.errors import TaskError
from selectune.models.bases import load_model
from selectune.models.evaluate import evaluate
from selectune.models.restore import Source, evaluate_delta, verify_delta
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.tasks import ANSWER, Example, Language
from selectune.tasks.kinds import token_losses

pytest_plugins = ("tiny_fixtures",)

TEXT = tasks.get("text/wikitext2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("texts"))


def direct(model, rows) -> float:
    """Perplexity from whole logits, a block at a time."""
    losses = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            losses.append(F.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean().exp().item()


class Letters:
    """A tokenizer that gives each letter its number."""

    def __init__(self, begin: list[int]):
        self.begin, self.bos_token_id = begin, 1

    def __call__(self, texts, add_special_tokens=True, **more):
        if isinstance(texts, str):
            return {"input_ids": [*self.begin, *map(ord, texts)]}
        return {"input_ids": [list(map(ord, text)) for text in texts]}


@given(some.lists(some.text("abc", max_size=9), min_size=1, max_size=5), some.integers(2, 12), some.booleans())
def test_every_token_is_predicted_once(texts, length, begins):
    """With a token that begins a text, all are; else all but the first."""
    whole = [ord(c) for c in "\n\n".join(texts)]
    rows = [Example((text,), None) for text in texts]
    if len(whole) + begins < 2:
        with pytest.raises(TaskError, match="at least 2 tokens"):
            Language().encode(TEXT, Letters([1] if begins else []), rows, length)
        return
    blocks = Language().encode(TEXT, Letters([1] if begins else []), rows, length)
    assert max(len(block["input_ids"]) for block in blocks) <= length
    predicted = [token for block in blocks for token in block["input_ids"][1:]]
    assert predicted == (whole if begins else whole[1:])
    assert sum(block[ANSWER] for block in blocks) == len(predicted)
    given_tokens = [block["input_ids"][0] for block in blocks]
    assert given_tokens == ([1] * len(blocks) if begins else [whole[i * (length - 1)] for i in range(len(blocks))])


@pytest.mark.parametrize("at_once", [1 << 23, 100])
def test_perplexity_is_the_direct_one(llama, texts, at_once, monkeypatch):
    monkeypatch.setattr(token_losses, "AT_ONCE", at_once)  # 100 logits are two tokens
    loaded = load_model(str(llama), TEXT.head, 0)
    rows = TEXT.encode(loaded.tokenizer, tasks.load(TEXT, "validation", texts).examples, 9)
    assert len({len(row["input_ids"]) for row in rows}) == 2  # the last block is short
    assert evaluate(loaded.model, loaded.tokenizer, TEXT, rows).value == pytest.approx(
        direct(loaded.model, rows), rel=1e-6
    )


def test_few_logits_are_formed_at_once(llama, monkeypatch):
    monkeypatch.setattr(token_losses, "AT_ONCE", 100)
    loaded = load_model(str(llama), TEXT.head, 0)
    head, seen = loaded.model.get_output_embeddings(), []
    head.register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    rows = TEXT.encode(loaded.tokenizer, [Example(("the dog sees " * 30,), None)], 31)
    evaluate(loaded.model, loaded.tokenizer, TEXT, rows)
    assert max(seen) <= max(100, len(rows) * head.weight.shape[0])
    assert not head._forward_pre_hooks


def test_logits_that_are_not_the_last_layers_output(llama, texts, monkeypatch):
    """A model with a cap on its logits gets whole logits, and the cap counts."""
    loaded = load_model(str(llama), TEXT.head, 0)
    rows = TEXT.encode(loaded.tokenizer, tasks.load(TEXT, "validation", texts).examples, 9)
    plain = evaluate(loaded.model, loaded.tokenizer, TEXT, rows).value
    inner = loaded.model.forward

    def capped(*args, **kwargs):
        found = inner(*args, **kwargs)
        found.logits = 0.01 * torch.tanh(found.logits / 0.01)
        return found

    monkeypatch.setattr(loaded.model, "forward", capped)
    found = evaluate(loaded.model, loaded.tokenizer, TEXT, rows).value
    assert found == pytest.approx(direct(loaded.model, rows), rel=1e-6)
    assert found != pytest.approx(plain, rel=1e-4)


def test_a_run_reproduces_its_perplexity(llama, texts, tmp_path):
    config = RunConfig(model=str(llama), task=TEXT.name, budget=200, max_steps=4, lr=1e-2, batch_size=4, max_length=16,
                       data=str(texts), out=str(tmp_path / "out"), eval_every=2)  # fmt: skip
    before = evaluate_delta(Source(str(llama)), None, TEXT, str(texts), 16)
    found = run(config)
    assert 1 < found.value < before.value
    assert found.evaluation.metric == "perplexity"
    assert found.best is not None
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert found.best["value"] == min(found.value, *(r["metric"] for r in written["history"] if "metric" in r))
    assert evaluate_delta(Source(str(llama)), found.delta, TEXT, str(texts)) == found.evaluation
    report = verify_delta(Source(str(llama)), found.delta)
    assert report.ok, report.problem
    loaded = load_model(str(llama), TEXT.head, 0)
    rows = TEXT.encode(loaded.tokenizer, tasks.load(TEXT, "validation", texts).examples, 16)
    assert direct(st.load_model(found.delta), rows) == pytest.approx(found.value, rel=1e-6)


def test_the_last_tenth_is_for_validation():
    task = tasks.get("text/tinyshakespeare")
    task = dataclasses.replace(task, generate=lambda split: [{"text": "abcdefghijklmnopqrst"}])
    assert tasks.load(task, "train").examples[0].texts == ("abcdefghijklmnopqr",)
    assert tasks.load(task, "validation").examples[0].texts == ("st",)


def test_the_texts_of_the_benchmark_data(real_data):
    assert len(tasks.load(TEXT, "validation", real_data)) == 60
    play = tasks.get("text/tinyshakespeare")
    lengths = [len(tasks.load(play, split, real_data).examples[0].texts[0]) for split in ("train", "validation")]
    assert sum(lengths) == 1_115_394
    assert len(tasks.load(tasks.get("text/english_novels"), "validation", real_data)) == 4


def test_an_overflow_is_a_number():
    assert math.isfinite(TEXT.scores([1e9], [1])["perplexity"])
