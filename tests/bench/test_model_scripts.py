"""benchmarks/tiny_t5.py and benchmarks/evaluation.py: what they write and print, on tiny models."""

from __future__ import annotations

import json
import random

import pytest
from cli_kit import call
from test_bars import script
from text_kit import DIALOGUES, make_llama
from tiny_kit import write_rows

TRIPLES = [
    {"category": "City", "size": 1, "triples": [f"{a} | near | {b}"], "references": [f"{a} lies near {b} ."]}
    for a, b in (("Ulm", "Bonn"), ("Rome", "Pisa"), ("Oslo", "Bergen"))
]


@pytest.fixture(scope="module")
def tiny_t5():
    return script("tiny_t5")


def test_a_gap_is_three_tokens_of_twenty_and_the_target_fills_it(tiny_t5):
    tokens, sentinels = list(range(100, 147)), [1, 2, 3]
    source, target = tiny_t5.gaps(tokens, sentinels, random.Random(5))
    whole = []
    for token in source:
        at = target.index(token) if token in sentinels else None
        whole += [token] if at is None else target[at + 1 : at + 4]
    assert whole == tokens
    assert [token for token in source if token in sentinels] == sentinels
    assert len(target) == 12


def test_a_pretrained_t5_is_a_base_for_text_to_text_rows(tiny_t5, tmp_path, capsys):
    write_rows(tmp_path / "texts.jsonl", DIALOGUES * 8)
    small = ["--vocabulary", "400", "--width", "32", "--layers", "1", "--steps", "40", "--batch", "4", "--lr", "1e-2",
             "--window", "40", "--text", str(tmp_path / "texts.jsonl")]  # fmt: skip
    for name in ("a", "b"):
        assert tiny_t5.main([*small, "--out", str(tmp_path / name)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["loss"] < 5.0  # log of 400 is 5.99
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    for split in ("train", "test"):
        write_rows(tmp_path / f"data/summarization/dialogsum/{split}.jsonl", DIALOGUES)
    given = ("--model", tmp_path / "a", "--task", "summarization/dialogsum", "--data", tmp_path / "data")
    call("train", *given, "--budget", 500, "--max-steps", 2, "--out", tmp_path / "run")
    value = json.loads((tmp_path / "run/run.json").read_text())["value"]
    again = call("eval", *given, "--delta", tmp_path / "run", "--json").stdout
    assert json.loads(again)["value"] == value


def test_perplexity_is_the_direct_one_and_batches_answer_alike(tmp_path, capsys):
    texts = [f"{row['references'][0]} It is {i} ." for i, row in enumerate(TRIPLES * 4)]
    write_rows(tmp_path / "data/text/wikitext2/validation.jsonl", [{"text": text} for text in texts])
    write_rows(tmp_path / "data/nlg/webnlg/validation.jsonl", TRIPLES)
    folder = make_llama(tmp_path / "llama", [*texts, *(row["triples"][0] for row in TRIPLES)])
    given = ["--model", str(folder), "--data", str(tmp_path / "data"), "--length", "16", "--tokens", "4"]
    assert script("evaluation").main(given) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["perplexity"]["relative difference"] < 1e-6
    assert told["perplexity"]["tokens"] > 60
    assert told["generation"]["in batches"]["BLEU"] == told["generation"]["one by one"]["BLEU"]
