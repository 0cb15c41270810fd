"""Entities in sequences of tags: their precision, recall and F1."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from selectune.errors import TaskError

log = logging.getLogger("selectune")

AS_IOBES = {"L": "E", "U": "S"}  # the letters of BILOU


def entity_f1(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1, precision and recall of entities: one is found if its first token, last token and type all agree.

    Over all rows, precision = found / predicted, recall = found / labelled, and F1 is their harmonic mean. A measure
    that would divide by 0 counts as 0. Tags are those that `entities` reads. Rows whose lengths differ raise TaskError.
    Source: the CoNLL-2000 scorer (Tjong Kim Sang and Buchholz, 2000), by whose rules seqeval counts as well.

    >>> entity_f1([["B-PER", "O", "O", "B-LOC"]], [["B-PER", "I-PER", "O", "B-LOC"]])
    {'f1': 0.5, 'precision': 0.5, 'recall': 0.5}
    """
    both = predicted = labelled = 0
    for row, (tags, truth) in enumerate(zip(predictions, labels, strict=True), 1):
        if len(tags) != len(truth):
            raise TaskError(
                f"Row {row} has {len(truth)} tags and {len(tags)} predictions; each token needs one of both."
            )
        found, wanted = entities(tags, f"prediction {row}"), entities(truth, f"row {row}")
        both, predicted, labelled = both + len(found & wanted), predicted + len(found), labelled + len(wanted)
    if not predicted or not labelled:
        what = " and ".join(name for name, n in (("labels", labelled), ("predictions", predicted)) if not n)
        log.warning("There is no entity in the %s of %d rows; what is undefined counts as 0.", what, len(labels))
    return {
        "f1": 2 * both / max(1, predicted + labelled),
        "precision": both / max(1, predicted),
        "recall": both / max(1, labelled),
    }


def entities(tags: Sequence[str], where: str = "a row") -> set[tuple[int, int, str]]:
    """(first token, last token, type) of each entity in a row of tags.

    A tag is O, or a letter and a type, as in B-PER. The letters are those of IOB1, IOB2, IOBES and BILOU: B begins an
    entity, I continues one, E or L ends one, S or U is a whole one. An entity ends before O, B, S and another type, and
    after E and S. The next tag that is not O begins one, whatever its letter, so broken sequences have entities too. A
    tag of another form raises TaskError, which names `where`.

    >>> sorted(entities(["I-PER", "I-LOC", "O", "B-LOC", "B-LOC"]))
    [(0, 0, 'PER'), (1, 1, 'LOC'), (3, 3, 'LOC'), (4, 4, 'LOC')]
    """
    found = set()
    start = last = kind = None  # of the entity that is open
    for i, tag in enumerate((*tags, "O")):
        letter, _, of = tag.partition("-")
        letter = AS_IOBES.get(letter, letter)
        if letter not in ("O", "B", "I", "E", "S") or (letter == "O" and tag != "O"):
            raise TaskError(
                f"The tag {tag!r:.40} in {where}, token {i + 1}, is unknown. A tag is O, or one of B, I, E, S, L and U "
                "with a type, as in B-PER."
            )
        if start is not None and (letter in "OBS" or of != kind or last in ("E", "S")):
            found.add((start, i - 1, kind))
            start = None
        if start is None and letter != "O":
            start, kind = i, of
        last = letter
    return found
