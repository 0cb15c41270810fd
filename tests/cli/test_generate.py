"""Every kind of task on rows of one's own: it trains, verifies, reproduces its number, and answers a file of rows."""

from __future__ import annotations

import json

import pytest
from cli_kit import call
from lm_kit import make_llama as make_words
from text_kit import DIALOGUES, SUMS, make_llama, make_t5
from tiny_kit import WORDS, write_rows

pytest_plugins = ("tiny_fixtures",)

TAGGED = [{"words": ["the", thing, "runs"], "tags": ["O", f"B-{kind}", "O"]}
          for thing, kind in (("dog", "PET"), ("cat", "PET"), ("tree", "BIG"), ("house", "BIG"))]  # fmt: skip
CHOSEN = [{"prompt": f"the {word}", "choices": [word, "sad"], "right": 0} for word in WORDS[4:8]]
TOLD = [{"story": f"the {word} sees a {word} ."} for word in WORDS[4:12]]
KINDS = {
    "tagging": (TAGGED, ("--text", "words", "--label", "tags")),
    "completion": (SUMS, ("--text", "question", "--label", "answer", "--kind", "completion")),
    "completion-loss": (SUMS, ("--text", "question", "--label", "answer", "--kind", "completion-loss")),
    "seq2seq": (DIALOGUES, ("--text", "dialogue", "--label", "summary", "--kind", "seq2seq")),
    "choice": (CHOSEN, ("--text", "prompt,choices", "--label", "right", "--kind", "choice")),
    "language": (TOLD, ("--text", "story", "--kind", "language")),
}
METRICS = ("f1", "exact match", "perplexity", "rougeL", "accuracy", "perplexity")


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    words = make_words(folder / "words")
    completes = make_llama(folder / "llama", [text for row in SUMS for text in row.values()])
    t5 = make_t5(folder / "t5", [text for row in DIALOGUES for text in row.values()])
    of = {"tagging": tiny, "seq2seq": t5, "choice": words, "language": words}
    return {kind: of.get(kind, completes) for kind in KINDS}


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("kind", "metric"), list(zip(KINDS, METRICS, strict=True)))
def test_a_kind(models, tmp_path, kind, metric):
    rows, columns = KINDS[kind]
    model, file, out = models[kind], tmp_path / "rows.jsonl", tmp_path / "run"
    write_rows(file, rows)
    train = ("train", "-m", model, "--train", file, "--validation", file, *columns, "-b", 60, "--max-steps", 1)
    printed = json.loads(call(*train, "--lr", "1e-2", "-o", out, "--json").stdout)
    assert printed["metric"] == metric
    assert json.loads(call("eval", "-m", model, "-d", out, "--json").stdout)["value"] == printed["value"]
    assert call("verify", "-m", model, "-d", out).stdout.startswith("ok")
    args = ("predict", "-m", model, "-d", out, "-i", file, "-o", tmp_path / "answers.jsonl")
    if kind in ("completion-loss", "language"):
        assert f"its kind, {kind}, is measured only" in call(*args, code=2).stderr
        return
    call(*args)
    found = lines(tmp_path / "answers.jsonl")
    assert [{key: value for key, value in row.items() if key != "prediction"} for row in found] == rows
    if kind == "tagging":
        assert all(len(row["prediction"]) == 3 and set(row["prediction"]) <= {"O", "B-PET", "B-BIG"} for row in found)
    elif kind == "choice":
        answers = [row["prediction"] for row in found]
        for row, answer in zip(rows, answers, strict=True):
            assert set(answer) == {"choice", "number", "log_likelihoods"}
            assert row["choices"][answer["number"]] == answer["choice"]
            assert answer["log_likelihoods"][answer["number"]] == max(answer["log_likelihoods"]) < 0
        right = sum(answer["number"] == row["right"] for row, answer in zip(rows, answers, strict=True))
        assert right / len(rows) == printed["value"]
    else:
        assert all(isinstance(row["prediction"], str) for row in found)


def test_generate(models, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"question": row["question"]} for row in SUMS])
    args = ("generate", "-m", models["completion"], "--text", "question", "-i", tmp_path / "rows.jsonl")
    call(*args, "--max-new-tokens", 5, "-o", tmp_path / "five.jsonl")
    call(*args, "--max-new-tokens", 2, "-o", tmp_path / "two.jsonl")
    five, two = (lines(tmp_path / f"{name}.jsonl") for name in ("five", "two"))
    assert [row["question"] for row in five] == [row["question"] for row in SUMS]
    for more, fewer in zip(five, two, strict=True):
        assert len(more["prediction"].split()) <= 5
        assert more["prediction"].startswith(fewer["prediction"])
    call(*args, "--beams", 2, "--max-new-tokens", 5, "-o", tmp_path / "beams.jsonl")
    write_rows(tmp_path / "d.jsonl", [{"dialogue": row["dialogue"]} for row in DIALOGUES])
    seq2seq = ("-m", models["seq2seq"], "--kind", "seq2seq", "--text", "dialogue", "-i", tmp_path / "d.jsonl")
    call("generate", *seq2seq, "--max-new-tokens", 3, "-o", tmp_path / "d-out.jsonl")
    assert len(lines(tmp_path / "d-out.jsonl")) == len(DIALOGUES)
    told = call(*args, "--kind", "classification", "-o", tmp_path / "none.jsonl", code=2).stderr
    assert "A task of the kind classification writes no text; `selectune predict` answers its rows." in told
