"""What the kinds that write text share: rows with a reference or several, and generation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selectune.errors import TaskError
from selectune.tasks.task import Example, Row, Task, texts_of

log = logging.getLogger("selectune")

SPECIAL = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""The settings of generation that belong to a model's vocabulary."""


@dataclass(frozen=True)
class Generating:
    """What is the same in the kinds that write text, whichever model they need.

    A row's label is a text, or a list of texts that are all right. Training reads the first of them, the metric all.
    An answer is the likeliest token at each step, or the best of several `beams`: nothing is drawn. It ends at the end
    of text or after `max_new_tokens`.
    """

    name: str
    batch: int = 16
    max_new_tokens: int = 128
    beams: int = 1

    def example(self, task: Task, row: Row, where: str) -> Example:
        texts, label = texts_of(task, row, where), row[task.label]
        known = (label,) if isinstance(label, str) else tuple(label) if isinstance(label, list | tuple) else ()
        if not known or not all(isinstance(text, str) and text.strip() for text in known):
            raise TaskError(
                f"{where}: the label of {task.name} must be a text, or a list of texts, none of them empty; "
                f"got {label!r:.80}."
            )
        if not any(text.strip() for text in texts):
            raise TaskError(f"{where}: there is no text in {', '.join(task.fields)} of {task.name}.")
        return Example(texts, known[0] if len(known) == 1 else known)

    def fits(self, task: Task, model: Any) -> None:
        """Raises TaskError if the model's positions do not hold an answer, and before it a token of the prompt."""
        positions = getattr(model.config, "max_position_embeddings", None)
        apart = getattr(model.config, "is_encoder_decoder", False)  # the prompt has positions of its own
        if positions is not None and positions < self.max_new_tokens + (not apart):
            raise TaskError(
                f"{task.name} generates up to {self.max_new_tokens} tokens, and this model has {positions} positions, "
                f"which {'are too few' if apart else 'leaves none for a prompt'}."
            )

    def generated(self, model: Any, tokenizer: Any, batch: dict[str, Tensor], skip: int) -> list[str]:
        """The texts that the model writes for a padded batch, without their first `skip` tokens.

        Of the settings of generation that a model brings along, only its special tokens count.
        """
        own, ends = model.generation_config, end_of_text(model, tokenizer)
        pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        settings = type(own)(
            **{name: getattr(own, name, None) for name in SPECIAL}, eos_token_id=ends, pad_token_id=pad,
            do_sample=False, num_beams=self.beams, max_new_tokens=self.max_new_tokens,
        )  # fmt: skip
        model.generation_config = settings  # what is not set in an argument is taken from there
        try:
            found = model.generate(**batch, generation_config=settings)
        finally:
            model.generation_config = own
        return [tokenizer.decode(row[skip:], skip_special_tokens=True).strip() for row in found.cpu()]


def needs_end(task: Task, tokenizer: Any) -> None:
    """Raises TaskError if the tokenizer has no end of text, which a model learns to write at the end of an answer."""
    if tokenizer.eos_token_id is None:
        raise TaskError(
            f"{task.name} needs a tokenizer with an end of text (eos_token), which ends an answer; "
            f"{type(tokenizer).__name__} has none."
        )


def first_reference(label: str | tuple[str, ...]) -> str:
    """The text that is trained on."""
    return label if isinstance(label, str) else label[0]


def answer_of(label: str | tuple[str, ...]) -> str | list[str]:
    """The text or texts that a prediction is compared with, as JSON has them."""
    return label if isinstance(label, str) else list(label)


def end_of_text(model: Any, tokenizer: Any) -> list[int]:
    """The numbers of the tokens that end a text: the tokenizer's, and those that the model's settings name."""
    own = getattr(model.generation_config, "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(end for end in (tokenizer.eos_token_id, *named) if end is not None))


def each_reference(examples: Sequence[Example], split: str) -> list[Example]:
    """For training an example of each reference; for validation each text once, with all its references.

    >>> each_reference([Example(("a",), ("x", "y")), Example(("a",), "z")], "validation")
    [Example(texts=('a',), label=('x', 'y', 'z'))]
    """
    pairs = [(e.texts, text) for e in examples for text in ((e.label,) if isinstance(e.label, str) else e.label)]
    if split == "train":
        return [Example(texts, text) for texts, text in pairs]
    found: dict[tuple[str, ...], list[str]] = {}
    for texts, text in pairs:
        found.setdefault(texts, []).append(text)
    return [Example(texts, known[0] if len(known) == 1 else tuple(known)) for texts, known in found.items()]
