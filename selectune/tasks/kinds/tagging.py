"""Tasks of one tag for each word, such as the entities of a sentence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selectune.errors import TaskError
from selectune.tasks.task import ANSWER, Example, Features, Head, Row, Task, filled, missing_in, padded, to_model

log = logging.getLogger("selectune")

OUTSIDE = "O"
"""The tag of a word that is in no entity, and of a word that the model cannot see."""

PIECES, WORDS = "pieces", "words"  # of a row of features: the tag's number of each piece, and each word's first piece


@dataclass(frozen=True)
class Tagging:
    """A tag of the task's `labels` for each word, by AutoModelForTokenClassification.

    A row has a list of words and a list of tags, as strings or as numbers of `labels`. The words are joined by spaces,
    which suits the byte-level tokenizers too. The first piece of a word stands for it, in the loss and in a prediction
    (Devlin et al., 2019, arXiv 1810.04805, section 5.3); all other pieces have the label -100. A word without a piece,
    because the sentence is longer than `max_length`, is predicted as O, and a log line counts such words.

    >>> from selectune import tasks
    >>> tasks.get("ner/conll2003").labels[:3]
    ('O', 'B-PER', 'I-PER')
    """

    name: str = "tagging"
    batch: int = 32

    def head(self, task: Task) -> Head:
        return Head("AutoModelForTokenClassification", len(task.labels), task.labels)

    def example(self, task: Task, row: Row, where: str) -> Example:
        missing_in(task, row, where)
        words, tags = row[task.fields[0]], row[task.label]
        if not _strings(words) or not words:
            raise TaskError(f"{where}: the words of {task.name} must be a list of strings, got {words!r:.80}.")
        if not isinstance(tags, list | tuple) or len(tags) != len(words):
            got = f"{len(tags)} tags" if isinstance(tags, list | tuple) else f"{tags!r:.80}"
            raise TaskError(f"{where}: {task.name} needs a list with a tag for each of {len(words)} words, got {got}.")
        return Example(tuple(words), tuple(_tag(task, tag, where) for tag in tags))

    def encode(self, task: Task, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Features]:
        if not tokenizer.is_fast:
            raise TaskError(
                f"{task.name} needs a fast tokenizer, which knows the place of each piece in the text; "
                f"{type(tokenizer).__name__} is a slow one. Save a tokenizer.json beside the model."
            )
        texts = [" ".join(example.texts) for example in examples]
        encoded = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
        places, number = encoded.pop("offset_mapping"), {tag: i for i, tag in enumerate(task.labels)}
        rows, lost = [], []
        for i, example in enumerate(examples):
            first = _first_pieces(example.texts, places[i])
            pieces = [-100] * len(places[i])
            for tag, at in zip(example.label, first, strict=True):
                if at is not None:
                    pieces[at] = number[tag]
            lost.append(first.count(None))
            made = {PIECES: pieces, WORDS: first, ANSWER: list(example.label)}
            rows.append({**{key: encoded[key][i] for key in encoded}, **made})
        if any(lost):
            log.warning(
                "%d words in %d of %d sentences of %s have no piece within max_length=%d; they count as predicted O.",
                sum(lost), sum(map(bool, lost)), len(rows), task.name, max_length,
            )  # fmt: skip
        return rows

    def collate(self, tokenizer: Any, rows: Sequence[Features]) -> dict[str, Tensor]:
        left = tokenizer.padding_side == "left"
        return {**padded(tokenizer, rows), "labels": filled([row[PIECES] for row in rows], -100, left)}

    def predict(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        numbers = model(**to_model(model, padded(tokenizer, rows))).logits.argmax(-1).tolist()
        left = tokenizer.padding_side == "left"
        lines = [line[-len(row[PIECES]) :] if left else line for line, row in zip(numbers, rows, strict=True)]
        return [
            [OUTSIDE if at is None else task.labels[line[at]] for at in row[WORDS]]
            for line, row in zip(lines, rows, strict=True)
        ]


def _strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _tag(task: Task, tag: Any, where: str) -> str:
    if type(tag) is int and 0 <= tag < len(task.labels):
        return task.labels[tag]
    if tag not in task.labels:
        raise TaskError(f"{where}: a tag of {task.name} must be one of {', '.join(task.labels)}, got {tag!r:.80}.")
    return tag


def _first_pieces(words: Sequence[str], places: Sequence[tuple[int, int]]) -> list[int | None]:
    """The number of each word's first piece, or None. `places`: of each piece in the words joined by spaces.

    A piece may begin with the space before its word, so its last character decides to which word it belongs.
    """
    found: list[int | None] = [None] * len(words)
    word, end = 0, len(words[0])  # of the word that the pieces have reached
    for piece, (start, stop) in enumerate(places):
        while word < len(words) and stop > end:
            word += 1
            end += 1 + len(words[word]) if word < len(words) else 0
        if start < stop and word < len(words) and stop > end - len(words[word]) and found[word] is None:
            found[word] = piece
    return found
