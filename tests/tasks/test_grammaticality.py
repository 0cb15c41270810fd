"""The generated task: what it promises."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from selectune import tasks
from selectune.tasks.demo.grammaticality import PHENOMENA, SIZES, generate
from selectune.tasks.demo.words import TRAIN, VALIDATION


@pytest.fixture(scope="module")
def rows():
    return {split: generate(split) for split in SIZES}


def test_sizes_and_balance(rows):
    for split, count in SIZES.items():
        assert len(rows[split]) == count
        assert Counter(row["label"] for row in rows[split]) == {0: count // 2, 1: count // 2}
        assert set(Counter(row["phenomenon"] for row in rows[split])) == set(PHENOMENA)


def test_no_sentence_occurs_twice(rows):
    sentences = [row["sentence"] for split in SIZES for row in rows[split]]
    assert len(set(sentences)) == len(sentences)


def test_pairs_differ_in_one_word_and_in_their_label(rows):
    pairs = defaultdict(list)
    for row in rows["validation"]:
        pairs[row["pair"]].append(row)
    for pair in pairs.values():
        good, bad = sorted(pair, key=lambda row: -row["label"])
        assert (good["label"], bad["label"]) == (1, 0)
        words = good["sentence"].split(), bad["sentence"].split()
        assert len(words[0]) == len(words[1])
        assert sum(a != b for a, b in zip(*words, strict=True)) == 1


def test_the_words_of_validation_are_never_seen_in_training(rows):
    assert not TRAIN.all() & VALIDATION.all()
    seen = {word for row in rows["train"] for word in row["sentence"].rstrip(".").split()}
    new = {word for row in rows["validation"] for word in row["sentence"].rstrip(".").split()} - seen
    stems = {word.lower() for word in VALIDATION.all()}
    assert not {word for word in seen if word.lower() in stems}
    assert len(new) > 80


def test_no_single_word_gives_the_answer(rows):
    labels = defaultdict(Counter)
    for row in rows["train"]:
        for word in set(row["sentence"].rstrip(".").split()):
            labels[word][row["label"]] += 1
    for word, counts in labels.items():
        if sum(counts.values()) >= 100:
            assert 0.2 < counts[1] / sum(counts.values()) < 0.8, word
    best = sum(max(counts.values()) for counts in labels.values()) / sum(sum(c.values()) for c in labels.values())
    assert best < 0.6


def test_the_same_seed_gives_the_same_rows(rows):
    assert generate("validation") == rows["validation"]
    assert generate("validation", seed=1) != rows["validation"]


def test_it_loads_without_data_and_without_network():
    split = tasks.load(tasks.get("demo/grammaticality"), "train")
    assert (len(split), split.origin) == (4000, "generated")
