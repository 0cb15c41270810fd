"""The generated task: what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from selectune import tasks
from selectune.tasks.demo.topic import SIZES, TOPICS, generate
from selectune.tasks.demo.words import PEOPLE, TRAIN, VALIDATION, VERBS

LISTS = {"train": TRAIN, "validation": VALIDATION}
FRAME = {"the", "and"} | {word for part in (*PEOPLE, *VERBS) for word in part.lower().split()}  # in both splits


@pytest.fixture(scope="module")
def rows():
    return {split: generate(split) for split in SIZES}


def said(row):
    return set(row["sentence"].lower().replace(".", "").split())


def test_sizes_and_balance(rows):
    for split, count in SIZES.items():
        assert len(rows[split]) == count
        assert Counter(row["label"] for row in rows[split]) == dict.fromkeys(range(len(TOPICS)), count // len(TOPICS))
    assert tasks.get("demo/topic").chance == 1 / len(TOPICS)


def test_no_sentence_occurs_twice(rows):
    sentences = [row["sentence"] for split in SIZES for row in rows[split]]
    assert len(set(sentences)) == len(sentences)


def test_the_nouns_of_validation_are_never_seen_in_training(rows):
    seen = {split: set().union(*map(said, rows[split])) for split in SIZES}
    assert seen["train"] & seen["validation"] == FRAME
    for split, topics in LISTS.items():
        assert seen[split] - FRAME == {noun for nouns in topics.values() for noun in nouns}  # every listed one is used


def test_a_noun_has_one_topic_and_one_split():
    every = [noun for topics in LISTS.values() for nouns in topics.values() for noun in nouns]
    assert len(set(every)) == len(every)
    assert all(noun.isalpha() and noun.islower() for noun in every)
    assert not FRAME & set(every)
    assert tuple(TRAIN) == tuple(VALIDATION) == TOPICS


def test_the_label_is_the_topic_of_the_nouns(rows):
    for split, found in rows.items():
        for row in found:
            nouns = said(row) - FRAME
            assert len(nouns) in (1, 2)
            assert nouns <= set(LISTS[split][TOPICS[row["label"]]])


def test_the_words_that_both_splits_share_tell_nothing(rows):
    labels = defaultdict(Counter)
    for row in rows["train"]:
        for word in said(row) & FRAME:
            labels[word][row["label"]] += 1
    for word, counts in labels.items():
        assert max(counts.values()) / sum(counts.values()) < 2 / len(TOPICS), word


def test_the_same_seed_gives_the_same_rows_whatever_the_hashes(rows):
    assert generate("validation") == rows["validation"]
    assert generate("validation", seed=1) != rows["validation"]
    code = (
        "import hashlib; from selectune.tasks.demo.topic import generate as g; "
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
    split = tasks.load(tasks.get("demo/topic"), "train")
    assert (len(split), split.origin) == (2400, "generated")
