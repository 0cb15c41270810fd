"""Classes told by a word in a blank: the loss, the place of the blank, runs that reproduce their number, refusals."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_kit import call
from lm_kit import make_llama
from tiny_kit import make_tokenizer, sentence, write_rows

import selectune as st
from selectune import tasks
from selectune.errors import CalibrationError, ConfigError, TaskError
from selectune.models.bases import load_model
from selectune.models.restore import Source, evaluate_delta, task_of, verify_delta
from selectune.runs.config import RunConfig
from selectune.runs.training import run
from selectune.study import attempt
from selectune.study.workspace import CELL, DONE
from selectune.tasks import Cloze, Example

pytest_plugins = ("tiny_fixtures",)

RTE = tasks.get("glue/rte")
NEXT, BLANKED, SAID = "the first: {} the second: {} this is", "{} with {} is [MASK] .", ("small", "big")


def longer(folder):
    """A model with room for examples in context."""
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**told, key: 128}))
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return longer(make_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A masked language model of two layers, whose tokenizer has a mask."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("masked")
    make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return longer(folder)


@pytest.fixture(params=["causal", "masked"])
def form(request):
    """A model's folder, its task as a cloze, and the pattern."""
    pattern = NEXT if request.param == "causal" else BLANKED
    return request.getfixturevalue(request.param), tasks.as_cloze(RTE, pattern, SAID), pattern


def examples(count=5):
    draw = random.Random(1)
    return [Example((sentence(draw), sentence(draw)), i % 2) for i in range(count)]


def oracle(model, tokenizer, row):
    """p of each class in float64, by the whole vocabulary at the blank of a row that is alone."""
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, row["blank"]].double().numpy()
    scores = logits[[tokenizer.convert_tokens_to_ids(word) for word in SAID]]
    return np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()


def test_loss_and_predictions_are_those_of_the_words_alone(form):
    folder, task, _ = form
    loaded = load_model(str(folder), task.head, 0)
    loaded.model.eval()
    rows = task.encode(loaded.tokenizer, examples(), 32)
    assert len({row["blank"] for row in rows}) > 1
    p = [oracle(loaded.model, loaded.tokenizer, row) for row in rows]
    batch = task.kind.collate(loaded.tokenizer, rows)
    with torch.no_grad():
        outputs = loaded.model(**{name: value for name, value in batch.items() if name != "labels"})
    wanted = [-np.log(each[row["answer"]]) for each, row in zip(p, rows, strict=True)]
    assert isinstance(task.kind, Cloze)
    assert task.kind.loss(outputs, batch["labels"]).item() == pytest.approx(np.mean(wanted), abs=1e-6)
    with torch.no_grad():
        assert task.kind.predict(task, loaded.model, loaded.tokenizer, rows) == [int(each.argmax()) for each in p]
        (first, *_) = task.kind.answers(task, loaded.model, loaded.tokenizer, rows)
    assert list(first["probabilities"].values()) == pytest.approx(p[0].tolist(), abs=1e-6)
    assert first["label"] == RTE.labels[int(p[0].argmax())]


def test_the_loss_of_a_step_is_the_mean_over_its_rows():
    """Two backward passes of unequal size make the loss of all their rows."""
    kind = Cloze(pattern=NEXT, words=SAID)
    logits = torch.randn(5, 3, 9)
    labels = torch.tensor([[i % 3, 4, 7, i % 2] for i in range(5)])
    parts = [kind.loss(SimpleNamespace(logits=logits[a:b]), labels[a:b], labels.numel()) for a, b in ((0, 3), (3, 5))]
    assert float(sum(parts)) == pytest.approx(kind.loss(SimpleNamespace(logits=logits), labels).item())


def test_a_run_reproduces_its_number_and_needs_no_head(form, data, tmp_path):
    folder, task, pattern = form
    given = {"model": str(folder), "task": RTE.name, "data": str(data), "pattern": pattern, "words": SAID}
    found = run(RunConfig(**given, budget=400, max_steps=4, accumulation=2, batch_size=8, lr=1e-2,
                          out=str(tmp_path / "out")))  # fmt: skip
    assert found.verification.changed > 0
    assert found.model["initialised"] == []
    assert found.kind == "cloze"
    recorded = task_of(st.load(found.delta))
    assert recorded is not None
    assert recorded.kind == task.kind
    assert evaluate_delta(Source(str(folder)), found.delta, recorded, str(data)) == found.evaluation
    assert verify_delta(Source(str(folder)), found.delta).ok
    same = ("eval", "--model", folder, "--delta", found.delta.parent, "--data", data, "--json")
    assert json.loads(call(*same).stdout)["value"] == found.value
    assert json.loads(call(*same, "--task", RTE.name).stdout)["value"] == found.value
    base = ("eval", "--model", folder, "--task", RTE.name, "--data", data, "--pattern", pattern, "--words", "small,big")
    assert "glue/rte: accuracy" in call(*base).stdout
    assert "records those" in call(*same, "--pattern", pattern, code=2).stderr


def test_rows_of_ones_own_are_answered_by_a_delta(causal, tmp_path):
    draw = random.Random(2)
    rows = [
        {"text": f"{sentence(draw)} {'the' if i % 2 else 'a'}", "label": "yes" if i % 2 else "no"} for i in range(24)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "new.jsonl", [{"text": row["text"]} for row in rows[:3]])
    call("train", "--model", causal, "--train", tmp_path / "rows.jsonl", "--hold-out", "0.25", "--text", "text",
         "--label", "label", "--pattern", "{} is it", "--words", "sad,happy", "--budget", "300", "--max-steps", "3",
         "--out", tmp_path / "run")  # fmt: skip
    call("predict", "--model", causal, "--delta", tmp_path / "run", "--input", tmp_path / "new.jsonl", "--out",
         tmp_path / "answers.jsonl")  # fmt: skip
    write_rows(tmp_path / "lacks.jsonl", [{"text": "a dog"}, {"txt": "a dog"}])
    lacks = ("predict", "--model", causal, "--delta", tmp_path / "run", "--input", tmp_path / "lacks.jsonl", "--out")
    assert "line 2 has no column 'text'. It has 'txt'." in call(*lacks, tmp_path / "none.jsonl", code=1).stderr
    assert "writes no text" in call("generate", *lacks[1:], tmp_path / "none.jsonl", code=2).stderr
    answers = [json.loads(line)["prediction"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [set(answer["probabilities"]) for answer in answers] == [{"no", "yes"}] * 3
    value = json.loads((tmp_path / "run" / "run.json").read_text())["value"]
    again = call("eval", "--model", causal, "--delta", tmp_path / "run", "--json").stdout
    assert json.loads(again)["value"] == value


def test_a_cloze_goes_on_from_its_checkpoint_to_the_same_bits(causal, data, tmp_path):
    given = ["train", "--model", causal, "--task", RTE.name, "--data", data, "--words", "small,big", "--budget", 200,
             "--max-steps", 4, "--save-every", 2, "--out", tmp_path]  # fmt: skip
    call(*given, "--pattern", NEXT)
    whole = (tmp_path / "delta.safetensors").read_bytes()
    for name in ("delta.safetensors", "run.json", "checkpoint-4/manifest.json"):
        (tmp_path / name).unlink()
    assert "other settings: pattern" in call(*given, "--pattern", f"{NEXT} a", "--resume", code=2).stderr
    call(*given, "--pattern", NEXT, "--resume")
    assert json.loads((tmp_path / "run.json").read_text())["resumed"] == 2
    assert (tmp_path / "delta.safetensors").read_bytes() == whole


def test_scores_from_data_read_the_loss_of_the_cloze(causal, data, tmp_path):
    given = {"model": str(causal), "task": RTE.name, "data": str(data), "pattern": NEXT, "words": SAID, "budget": 300}
    found = run(RunConfig(**given, method="static-d3:batches=2", max_steps=2, out=str(tmp_path / "a")))
    assert found.selected == 300
    with pytest.raises(CalibrationError):
        run(RunConfig(**given, method="fish:labels=model,examples=2", max_steps=2, out=str(tmp_path / "b")))


def test_examples_in_context_stand_before_every_row(form, data, tmp_path):
    folder, task, pattern = form
    first = tasks.load(task, "train", data)
    shown = tasks.first_rows(task, first, 2).examples
    loaded = load_model(str(folder), task.head, 0)
    told = tasks.with_shots(task, shown)
    texts = loaded.tokenizer.decode(told.encode(loaded.tokenizer, examples(1), 99)[0]["input_ids"])
    for example in shown:
        assert example.texts[0].removesuffix(" .") in texts
    assert texts.count(SAID[0]) + texts.count(SAID[1]) >= 2
    given = {"model": str(folder), "task": RTE.name, "data": str(data), "pattern": pattern, "words": SAID, "shots": 2}
    found = run(RunConfig(**given, budget=300, max_steps=2, max_length=96, lr=1e-3, out=str(tmp_path / "out")))
    recorded = task_of(st.load(found.delta))
    assert recorded is not None
    assert recorded.kind == told.kind
    assert evaluate_delta(Source(str(folder)), found.delta, recorded, str(data)) == found.evaluation
    base = ("eval", "--model", folder, "--task", RTE.name, "--data", data, "--pattern", pattern, "--words", "small,big",
            "--max-length", 96, "--shots")  # fmt: skip
    assert "glue/rte: accuracy" in call(*base, 2).stdout
    assert "of glue/rte are 48" in call(*base, 49, code=1).stderr
    short = call(*base[:-2], 8, "--shots", 2, code=1).stderr
    assert "characters of examples in context" in short
    with pytest.raises(ConfigError, match=r"have 2\d,\d+ characters"):
        tasks.with_shots(task, [Example(("a" * 11_000, "b"), 0)] * 2)
    with pytest.raises(ConfigError, match="shots need the words of a pattern"):
        RunConfig(model="demo", task=RTE.name, budget=10, shots=2)


def test_a_study_measures_a_cloze_on_a_further_task(causal, data, tmp_path, monkeypatch):
    rows = [{"sentence1": "a dog", "sentence2": "the cat", "label": i % 2, "idx": i} for i in range(4)]
    write_rows(data / "glue/mrpc/validation.jsonl", rows)
    settings = {"model": str(causal), "task": RTE.name, "budget": 50, "max_steps": 1, "pattern": NEXT, "words": SAID,
                "data": str(data), "out": str(tmp_path)}  # fmt: skip
    told = {"phase": "main", "settings": settings, "measure": ["glue/mrpc"], "name": None, "title": None, "key": "k"}
    (tmp_path / CELL).write_text(json.dumps(told))
    monkeypatch.setattr(attempt, "_listen", lambda stop: None)
    assert attempt.main(tmp_path) == 0, (tmp_path / attempt.ERROR).read_text()
    last = json.loads((tmp_path / DONE).read_text())["records"][-1]
    assert (last["setting"]["task"], last["examples"]) == ("glue/mrpc", 4)


def test_a_long_row_loses_the_end_of_its_longest_text(form, caplog):
    folder, task, _ = form
    tokenizer = load_model(str(folder), task.head, 0).tokenizer
    long, short = " ".join(["dog"] * 40), "cat sleeps ."
    (row,) = task.encode(tokenizer, [Example((long, short), 0)], 24)
    text = tokenizer.decode(row["input_ids"])
    assert len(row["input_ids"]) <= 24
    assert "cat sleeps" in text
    assert text.count("dog") >= 5
    assert "1 of 1 rows of glue/rte were cut to max_length=24" in caplog.text
    with pytest.raises(TaskError, match="no place for the pattern"):
        task.encode(tokenizer, [Example((long, short), 0)], 3)


@pytest.mark.parametrize(
    ("pattern", "words", "why"),
    [
        ("{} is", SAID, "must have {} for each text of glue/rte, which are sentence1, sentence2"),
        ("{} {} [MASK] [MASK]", SAID, "once at most"),
        ("{} {} is", ("small",), "a word for each of its labels, all different: entailment, not_entailment. Got small"),
        ("{} {} is", ("small", "small"), "all different"),
        ("{} {} is", (), "Got none"),
        ("{} {}\udc80", SAID, "are no UTF-8"),
        ("{} {} is", ("small", "\ud800"), "are no UTF-8"),
    ],
)
def test_patterns_that_do_not_fit_are_told(pattern, words, why):
    with pytest.raises(ConfigError, match=why.replace("{", r"\{")):
        RunConfig(model="demo", task=RTE.name, budget=10, pattern=pattern, words=words)


def test_words_and_models_that_do_not_fit_are_told(causal, masked):
    for folder, head in ((causal, NEXT), (masked, BLANKED)):
        task = tasks.as_cloze(RTE, head, ("small", "nowhere"))
        with pytest.raises(TaskError, match=r"not (different tokens|one token)"):
            task.encode(load_model(str(folder), task.head, 0).tokenizer, examples(), 32)
    task = tasks.as_cloze(RTE, BLANKED, SAID)
    tokenizer = load_model(str(causal), tasks.as_cloze(RTE, NEXT, SAID).head, 0).tokenizer
    with pytest.raises(TaskError, match="tokenizer has no mask"):
        task.encode(tokenizer, examples(), 32)
    backwards = tasks.as_cloze(RTE, NEXT, SAID)
    with pytest.raises(TaskError, match="BertLMHeadModel reads what follows a word"):
        backwards.fits(load_model(str(masked), backwards.head, 0).model)
    with pytest.raises(TaskError, match="in its own text"):
        task.encode(load_model(str(masked), task.head, 0).tokenizer, [Example(("a [MASK]", "b"), 0)], 32)
    shown = tasks.with_shots(task, [Example(("a [MASK]", "b"), 0)])
    with pytest.raises(TaskError, match="in its own text"):
        shown.encode(load_model(str(masked), task.head, 0).tokenizer, examples(), 64)
    tokenizer.mask_token = "<mask>"
    with pytest.raises(TaskError, match=r"Write \[MASK\]"):
        tasks.as_cloze(RTE, "{} {} is <mask>", SAID).encode(tokenizer, examples(), 32)
    with pytest.raises(ConfigError, match="glue/stsb is a regression"):
        tasks.as_cloze(tasks.get("glue/stsb"), "{} {}", SAID)
    with pytest.raises(ConfigError, match="words are those of a pattern"):
        RunConfig(model="demo", task=RTE.name, budget=10, words=SAID)


def test_a_space_before_a_word_is_part_of_it():
    asked = []

    class Bytes:
        unk_token_id = None

        def __call__(self, texts, **more):
            asked.append(texts)
            return {"input_ids": [[i] for i in range(len(texts))]}

    for pattern in ("{} It was", "{} It was ", "{} It was [MASK].", "{}\nAnswer:\n", "{} It was '[MASK]'"):
        Cloze(pattern=pattern, words=("bad", "good"))._tokens_of_words(Bytes())
    assert asked == [[" bad", " good"]] * 3 + [["bad", "good"]] * 2
