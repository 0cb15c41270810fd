"""Entities against seqeval's numbers, and against the sequences that known entities give."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as some

from selectune.errors import TaskError
from selectune.tasks.metrics.entities import entities, entity_f1

# (labels | predictions, entities in both, in the predictions, in the labels); / parts rows. The numbers are those of
# seqeval 1.2.2 in its default mode. It does not know the letters of BILOU: there it was given E for L and S for U.
CASES = [
    # IOB2
    ("B-PER I-PER O B-LOC | B-PER O O B-LOC", 1, 2, 2),
    ("B-PER I-PER O B-LOC | B-PER I-PER O B-LOC", 2, 2, 2),
    ("B-PER I-PER O O | O O O O", 0, 0, 1),
    ("O O O | B-PER I-PER O", 0, 1, 0),
    ("O O | O O", 0, 0, 0),
    ("B-PER | B-LOC", 0, 1, 1),
    ("B-PER | B-PER", 1, 1, 1),
    ("B-PER I-PER I-PER | B-PER I-PER O", 0, 1, 1),
    ("B-PER I-PER I-PER | O B-PER I-PER", 0, 1, 1),
    ("B-PER I-PER I-PER | B-PER I-PER B-PER", 0, 2, 1),
    ("B-PER B-PER | B-PER I-PER", 0, 1, 2),
    ("B-PER I-PER | B-PER B-PER", 0, 2, 1),
    ("B-PER B-LOC | B-PER B-LOC", 2, 2, 2),
    ("B-PER I-PER B-PER I-PER | B-PER I-PER I-PER I-PER", 0, 1, 2),
    ("O B-ORG I-ORG O B-MISC O | O B-ORG I-ORG O B-ORG O", 1, 2, 2),
    ("B-ORG I-ORG I-ORG I-ORG O | B-ORG I-ORG O B-ORG O", 0, 2, 1),
    ("B-A-B I-A-B O | B-A-B I-A-B O", 1, 1, 1),
    ("B-A-B I-A-B O | B-A I-A O", 0, 1, 1),
    ("B-PER O B-PER O B-PER | B-PER O O O B-PER", 2, 2, 3),
    ("B-LOC I-LOC O O B-PER | B-LOC I-LOC I-LOC I-LOC B-PER", 1, 2, 2),
    # broken IOB2: I- without B-, types that change
    ("B-PER I-PER O | I-PER I-PER O", 1, 1, 1),
    ("O B-LOC I-LOC | O I-LOC I-LOC", 1, 1, 1),
    ("B-PER I-PER O | B-PER I-LOC O", 0, 2, 1),
    ("B-PER I-LOC | B-PER I-LOC", 2, 2, 2),
    ("B-PER B-LOC | B-PER I-LOC", 2, 2, 2),
    ("B-PER I-PER I-LOC I-LOC | B-PER I-PER B-LOC I-LOC", 2, 2, 2),
    ("O I-PER O I-PER | O B-PER O B-PER", 2, 2, 2),
    ("I-PER B-PER | B-PER B-PER", 2, 2, 2),
    ("I-PER I-LOC I-PER | B-PER B-LOC B-PER", 3, 3, 3),
    ("B-PER O I-PER | B-PER O B-PER", 2, 2, 2),
    ("B-PER I-PER I-PER | B-PER I-LOC I-PER", 0, 3, 1),
    # IOB1
    ("I-PER I-PER O I-LOC | I-PER I-PER O I-LOC", 2, 2, 2),
    ("I-PER B-PER I-PER O | I-PER B-PER I-PER O", 2, 2, 2),
    ("I-PER B-PER I-PER O | I-PER I-PER I-PER O", 0, 1, 2),
    ("I-PER I-LOC B-LOC | I-PER I-LOC I-LOC", 1, 2, 3),
    ("I-PER I-PER O I-LOC | B-PER I-PER O B-LOC", 2, 2, 2),
    ("I-ORG B-ORG B-ORG | B-ORG B-ORG B-ORG", 3, 3, 3),
    ("O I-MISC I-MISC B-MISC | O I-MISC I-MISC I-MISC", 0, 1, 2),
    # IOBES
    ("B-PER I-PER E-PER O S-LOC | B-PER I-PER E-PER O S-LOC", 2, 2, 2),
    ("B-PER E-PER S-PER | B-PER E-PER S-PER", 2, 2, 2),
    ("S-PER S-PER S-LOC | S-PER S-PER S-PER", 2, 3, 3),
    ("B-PER E-PER B-PER E-PER | B-PER I-PER I-PER E-PER", 0, 1, 2),
    ("B-PER I-PER E-PER | B-PER I-PER I-PER", 1, 1, 1),
    ("S-PER O S-LOC | B-PER O B-LOC", 2, 2, 2),
    ("B-PER E-PER O | S-PER S-PER O", 0, 2, 1),
    ("O S-ORG S-ORG O | O B-ORG E-ORG O", 0, 1, 2),
    # broken IOBES: E without B, B without E
    ("B-PER E-PER O | O E-PER O", 0, 1, 1),
    ("S-PER O S-PER | E-PER O I-PER", 2, 2, 2),
    ("E-PER E-PER | S-PER S-PER", 2, 2, 2),
    ("B-PER E-PER | I-PER E-PER", 1, 1, 1),
    ("B-PER E-PER I-PER | B-PER E-PER S-PER", 2, 2, 2),
    ("S-PER I-PER E-PER | S-PER B-PER E-PER", 2, 2, 2),
    ("S-PER E-PER | S-PER S-PER", 2, 2, 2),
    ("B-PER S-PER | B-PER B-PER", 2, 2, 2),
    ("B-PER E-LOC | S-PER S-LOC", 2, 2, 2),
    ("I-PER E-PER I-PER I-PER | B-PER I-PER B-PER I-PER", 2, 2, 2),
    ("E-PER I-LOC E-LOC B-LOC | S-PER B-LOC E-LOC S-LOC", 3, 3, 3),
    ("B-PER B-PER E-PER E-PER | S-PER B-PER E-PER S-PER", 3, 3, 3),
    # BILOU
    ("B-PER I-PER L-PER O U-LOC | B-PER I-PER L-PER O U-LOC", 2, 2, 2),
    ("U-PER U-PER O | U-PER U-PER O", 2, 2, 2),
    ("U-PER U-PER O | B-PER L-PER O", 0, 1, 2),
    ("B-PER L-PER B-PER L-PER | B-PER I-PER I-PER L-PER", 0, 1, 2),
    ("B-PER L-PER U-LOC | B-PER L-PER U-PER", 1, 2, 2),
    ("L-PER L-PER O | U-PER U-PER O", 2, 2, 2),
    ("B-PER I-PER O | B-PER L-PER U-PER", 1, 2, 1),
    # one letter, and no type
    ("B I O B | B I O B", 2, 2, 2),
    ("B I I | B B I", 0, 2, 1),
    ("I O I | B O S", 2, 2, 2),
    ("B-PER I | B-PER I", 2, 2, 2),
    # several rows
    ("B-PER I-PER / B-LOC O | B-PER I-PER / I-LOC O", 2, 2, 2),
    ("B-PER / I-PER | B-PER / B-PER", 2, 2, 2),
    ("O O / B-LOC I-LOC O / S-PER | B-LOC O / B-LOC I-LOC O / S-PER", 2, 3, 2),
]


@pytest.mark.parametrize(("rows", "both", "predicted", "labelled"), CASES)
def test_counts_equal_seqevals(rows, both, predicted, labelled):
    labels, predictions = ([row.split() for row in side.split(" / ")] for side in rows.split(" | "))
    assert sum(len(entities(row)) for row in predictions) == predicted
    assert sum(len(entities(row)) for row in labels) == labelled
    assert entity_f1(predictions, labels) == {
        "f1": 2 * both / (predicted + labelled) if predicted + labelled else 0.0,
        "precision": both / predicted if predicted else 0.0,
        "recall": both / labelled if labelled else 0.0,
    }


SPANS = some.lists(some.tuples(some.integers(0, 2), some.integers(1, 4), some.sampled_from(["PER", "LOC", "A-B"])))


def _written(scheme: str, spans: list[tuple[int, int, str]]) -> tuple[list[str], set[tuple[int, int, str]]]:
    """Entities, each (tokens outside before it, its tokens, its type), as tags of a scheme; and the entities."""
    tags: list[str] = []
    placed = set()
    for gap, length, kind in spans:
        tags += ["O"] * gap
        placed.add((len(tags), len(tags) + length - 1, kind))
        if scheme == "IOB1":
            letters = ("B" if tags and tags[-1][2:] == kind else "I") + "I" * (length - 1)
        elif scheme == "IOB2":
            letters = "B" + "I" * (length - 1)
        else:
            one, end = ("S", "E") if scheme == "IOBES" else ("U", "L")
            letters = one if length == 1 else "B" + "I" * (length - 2) + end
        tags += [f"{letter}-{kind}" for letter in letters]
    return tags, placed


@pytest.mark.parametrize("scheme", ["IOB1", "IOB2", "IOBES", "BILOU"])
@given(spans=SPANS)
def test_entities_that_are_written_are_read(scheme, spans):
    tags, placed = _written(scheme, spans)
    assert entities(tags) == placed


@given(row=some.lists(some.sampled_from(["O", "B-A", "I-A", "E-A", "S-A", "B-B", "I-B", "E-B", "S-B"])))
def test_any_tag_but_o_is_in_one_entity_of_its_type(row):
    covered = [(i, kind) for first, last, kind in entities(row) for i in range(first, last + 1)]
    assert sorted(covered) == [(i, tag[2:]) for i, tag in enumerate(row) if tag != "O"]


def test_what_is_undefined_counts_as_zero_and_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="selectune"):
        assert entity_f1([["O", "O"]], [["O", "B-PER"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}
    assert "no entity in the predictions of 1 rows" in caplog.text


@pytest.mark.parametrize("tag", ["PER", "X-PER", "", "b-PER", "O-PER", "BPER", "-"])
def test_an_unknown_tag_is_named(tag):
    with pytest.raises(TaskError, match=r"in prediction 2, token 1, is unknown\. A tag is O"):
        entity_f1([["O"], [tag]], [["O"], ["O"]])


def test_rows_have_a_tag_for_each_token():
    with pytest.raises(TaskError, match="Row 2 has 2 tags and 1 predictions"):
        entity_f1([["O"], ["O"]], [["O"], ["O", "B-PER"]])
