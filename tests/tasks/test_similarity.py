"""The generated task: what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from selectune import tasks
from selectune.tasks.demo import words
from selectune.tasks.demo.similarity import SIZES, generate
from selectune.tasks.demo.words import TRAIN, VALIDATION
from selectune.tasks.metrics import pearson_spearman

LEVELS = (0.0, 1.25, 2.5, 3.75, 5.0)
LISTS = {"train": TRAIN, "validation": VALIDATION}
CLOSED = {"the", "in", "it", "was", "that"}  # the words of the templates, in both splits


@pytest.fixture(scope="module")
def rows():
    return {split: generate(split) for split in SIZES}


def sentences(row):
    return row["sentence1"], row["sentence2"]


def said(sentence):
    return set(sentence.lower().replace(".", "").replace(",", "").split())


def test_sizes_and_balance(rows):
    for split, count in SIZES.items():
        assert len(rows[split]) == count
        assert Counter(row["label"] for row in rows[split]) == dict.fromkeys(LEVELS, count // len(LEVELS))


def test_no_pair_occurs_twice_in_either_order_and_none_is_one_sentence(rows):
    pairs = [frozenset(sentences(row)) for split in SIZES for row in rows[split]]
    assert len(set(pairs)) == len(pairs)
    assert {len(pair) for pair in pairs} == {2}


def test_no_sentence_of_validation_occurs_in_training(rows):
    seen = {split: {text for row in rows[split] for text in sentences(row)} for split in SIZES}
    assert not seen["train"] & seen["validation"]


def test_the_words_of_validation_are_never_seen_in_training(rows):
    seen = {split: set().union(*(said(text) for row in rows[split] for text in sentences(row))) for split in SIZES}
    assert seen["train"] & seen["validation"] == CLOSED
    for split, found in seen.items():
        assert found - CLOSED == set(LISTS[split].all())  # and every listed word is used


def test_a_word_has_one_meaning():
    every = [*TRAIN.all(), *VALIDATION.all()]
    assert len(set(every)) == len(every)
    assert all(word.isalpha() and word.islower() for word in every)
    assert all(len(meaning) == 2 for split in LISTS.values() for part in words.PARTS for meaning in split.of(part))


def test_the_score_is_the_share_of_parts_in_common(rows):
    for split, found in rows.items():
        meaning = {
            word: (part, number)
            for part in words.PARTS
            for number, group in enumerate(LISTS[split].of(part))
            for word in group
        }
        for row in found:
            first, second = ({meaning[word] for word in said(text) - CLOSED} for text in sentences(row))
            assert len(first) == len(second) == len(words.PARTS)
            assert row["label"] == 5.0 * len(first & second) / len(words.PARTS)


def test_counting_equal_words_does_not_give_the_score(rows):
    for found in rows.values():
        equal = [len((said(row["sentence1"]) & said(row["sentence2"])) - CLOSED) for row in found]
        assert 0.3 < pearson_spearman(equal, [row["label"] for row in found]) < 0.6


def test_no_word_tells_the_score(rows):
    scores: dict[str, list[float]] = {}
    for row in rows["train"]:
        for word in said(row["sentence1"]) | said(row["sentence2"]):
            scores.setdefault(word, []).append(row["label"])
    assert all(1.9 < sum(found) / len(found) < 3.1 for found in scores.values())


def test_the_same_seed_gives_the_same_rows_whatever_the_hashes(rows):
    assert generate("validation") == rows["validation"]
    assert generate("validation", seed=1) != rows["validation"]
    code = "import hashlib; from selectune.tasks.demo.similarity import generate as g; " + (
        "print(hashlib.sha256(repr([g('train'), g('validation')]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(digests) == 1


def test_it_loads_without_data_and_without_network():
    split = tasks.load(tasks.get("demo/similarity"), "train")
    assert (len(split), split.origin) == (4000, "generated")
