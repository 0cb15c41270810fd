"""Tasks of turning a text into another, by an encoder and a decoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selectune.tasks.kinds.generating import Generating, answer_of, first_reference, needs_end
from selectune.tasks.task import ANSWER, Example, Features, Head, Task, filled, padded, to_model

log = logging.getLogger("selectune")

TARGET = "target"
"""Of a row of features: the tokens of its target."""


@dataclass(frozen=True)
class Seq2Seq(Generating):
    """A target text for a source text, by AutoModelForSeq2SeqLM.

    The texts of a row are the lines of its source. `prefix` is put before it if the tokenizer is T5's, which learned to
    tell tasks by such words (Raffel et al., 2020, arXiv 1910.10683). A source that is longer than `max_length` and a
    target that is longer than `target_length` lose their ends, and log lines count both.

    >>> from selectune import tasks
    >>> tasks.get("summarization/dialogsum").kind.prefix
    'summarize: '
    """

    name: str = "seq2seq"
    prefix: str = ""
    target_length: int = 128

    def head(self, task: Task) -> Head:
        return Head("AutoModelForSeq2SeqLM")

    def encode(self, task: Task, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Features]:
        needs_end(task, tokenizer)
        prefix = self.prefix if "T5" in type(tokenizer).__name__ else ""
        sources = tokenizer([prefix + "\n".join(example.texts) for example in examples])
        targets = tokenizer(text_target=[first_reference(example.label) for example in examples])["input_ids"]
        for what, rows, length in (
            ("sources", sources["input_ids"], max_length),
            ("targets", targets, self.target_length),
        ):
            if (cut := sum(len(row) > length for row in rows)) > 0:
                log.warning(
                    "%d of %d %s of %s are longer than %d tokens and lose their ends.",
                    cut, len(rows), what, task.name, length,
                )  # fmt: skip
        return [
            {
                **{key: _cut(sources[key][i], max_length, tokenizer) for key in sources},
                TARGET: _cut(targets[i], self.target_length, tokenizer),
                ANSWER: answer_of(example.label),
            }
            for i, example in enumerate(examples)
        ]

    def collate(self, tokenizer: Any, rows: Sequence[Features]) -> dict[str, Tensor]:
        return {**padded(tokenizer, rows), "labels": filled([row[TARGET] for row in rows], -100)}

    def predict(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        return self.generated(model, tokenizer, to_model(model, padded(tokenizer, rows)), 1)


def _cut(tokens: list[int], length: int, tokenizer: Any) -> list[int]:
    """The first tokens, with the end of text after them if it was there."""
    if len(tokens) <= length:
        return tokens
    return [*tokens[: length - 1], tokens[-1] if tokens[-1] == tokenizer.eos_token_id else tokens[length - 1]]
