"""One of several classes, told by a word in a blank, by a language model's own head."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selectune.errors import ConfigError, TaskError
from selectune.files.reading import short, some
from selectune.tasks.kinds.classify import Classification, targets
from selectune.tasks.task import ANSWER, Example, Features, Head, Task, to_model, token_batch

log = logging.getLogger("selectune")

BLANK = "[MASK]"

LONGEST = 20_000
"""Characters of the examples in context."""


@dataclass(frozen=True)
class Cloze(Classification):
    """A class of several, told by a word in a blank: a pattern makes a text of a row, and each class has a word.

        p(class | row) = exp(z(word of the class)) / sum over classes of exp(z(word)),    z: the logits at the blank

    `pattern`: a text with {} for each text of a row, in their order, and [MASK] for the blank, which a masked language
    model fills (AutoModelForMaskedLM). Without [MASK] the blank is the word that follows the pattern, by a causal
    language model (AutoModelForCausalLM). `words`: one for each of the task's labels; each must be one token of the
    model's vocabulary. No head is drawn, so a base answers before it is trained. The loss is the cross-entropy of p.
    `context`: a text before every row, such as examples with their words (`with_shots`). A row that is too long loses
    tokens at the end of its longest text, and the log counts such rows.

    Source: Schick, Schütze 2021 (PET), arXiv 2001.07676, equation 1. Their further loss, 1e-4 times that of masked
    language modelling on unlabelled rows, is left out.

    >>> Cloze(pattern="{} All in all, it was [MASK].", words=("bad", "good")).masked
    True
    """

    name: str = "cloze"
    pattern: str = "{}"
    words: tuple[str, ...] = ()
    context: str = ""

    @property
    def masked(self) -> bool:
        return BLANK in self.pattern

    def head(self, task: Task) -> Head:
        return Head("AutoModelForMaskedLM" if self.masked else "AutoModelForCausalLM")

    def fits(self, task: Task, model: Any) -> None:
        """Raises TaskError for a model that is not causal, or cannot give the logits of some places only."""
        if self.masked:
            return
        if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
            raise TaskError(
                f"{type(model).__name__} has no logits_to_keep, so the logits of a blank cannot be asked for alone. "
                f"{task.name} as a cloze needs a causal model that has it."
            )
        if _looks_ahead(model):
            raise TaskError(
                f"{type(model).__name__} reads what follows a word, so it is no causal language model. Give the "
                f"pattern a blank for it: {BLANK}."
            )

    def encode(self, task: Task, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Features]:
        mask = tokenizer.mask_token if self.masked else None
        if self.masked and mask is None:
            raise TaskError(
                f"The pattern {short(self.pattern)} has {BLANK}, and this model's tokenizer has no mask. Without "
                f"{BLANK} the word that follows the pattern is asked for, which suits a causal language model."
            )
        if not self.masked and tokenizer.mask_token is not None and tokenizer.mask_token in self.pattern:
            raise TaskError(
                f"The pattern {short(self.pattern)} has {tokenizer.mask_token}, which this model's tokenizer calls its "
                f"mask. Write {BLANK} for the blank."
            )
        words = self._tokens_of_words(tokenizer)
        rows, cut = [], 0
        for example in examples:
            if mask is not None and any(mask in text for text in (self.context, *example.texts)):
                raise TaskError(f"A row of {task.name} has {mask} in its own text: {short(' '.join(example.texts))}.")
            tokens, shortened = self._fitted(tokenizer, example.texts, task, max_length)
            cut += shortened
            blank = tokens.index(tokenizer.mask_token_id) if self.masked else len(tokens) - 1
            rows.append({"input_ids": tokens, "blank": blank, "words": words, ANSWER: example.label})
        if cut:
            log.warning("%d of %d rows of %s were cut to max_length=%d tokens.", cut, len(rows), task.name, max_length)
        return rows

    def collate(self, tokenizer: Any, rows: Sequence[Features]) -> dict[str, Tensor]:
        """Labels are (rows, 2 + classes): where the logits of the blank are, the token of each word, and the class.

        If the probability of each class is to be learned, these stand in place of the class, all in float32.
        Of a causal model, only the logits at the places of blanks are asked for, since a vocabulary is large.
        """
        batch = token_batch(tokenizer, [row["input_ids"] for row in rows])
        places = sorted({row["blank"] for row in rows})
        if not self.masked:
            batch["logits_to_keep"] = torch.tensor(places)
        blanks = [row["blank"] if self.masked else places.index(row["blank"]) for row in rows]
        answers = targets([row[ANSWER] for row in rows])
        asked = torch.tensor([[at, *row["words"]] for at, row in zip(blanks, rows, strict=True)], dtype=answers.dtype)
        return {**batch, "labels": torch.cat([asked, answers.reshape(len(rows), -1)], 1)}

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The mean cross-entropy over rows, of the whole step if the numbers in all its labels are told."""
        asked = len(self.words) + 1
        scores, answers = _at_blanks(outputs.logits, labels[:, :asked].long()), labels[:, asked:]
        rows = len(labels) if num_items_in_batch is None else num_items_in_batch / labels.shape[1]
        answers = answers if answers.is_floating_point() else answers[:, 0]
        return F.cross_entropy(scores, answers, reduction="sum") / rows

    def predict(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        return self.predicted(self._logits(model, tokenizer, rows))

    def answers(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        return [self.answer(task, row) for row in self.probabilities(self._logits(model, tokenizer, rows)).tolist()]

    def _logits(self, model: Any, tokenizer: Any, rows: Sequence[Features]) -> Tensor:
        batch = self.collate(tokenizer, rows)
        logits = model(**to_model(model, batch)).logits
        asked = batch["labels"][:, : len(self.words) + 1].long().to(logits.device)
        return _at_blanks(logits, asked).cpu()

    def _tokens_of_words(self, tokenizer: Any) -> list[int]:
        """The token of each word. Byte-level vocabularies have the space before a word in its token."""
        spaced = self.pattern.partition(BLANK)[0].endswith(" ") if self.masked else not self.pattern.endswith("\n")
        space = " " if spaced else ""
        found = tokenizer([space + word for word in self.words], add_special_tokens=False)["input_ids"]
        if several := [word for word, tokens in zip(self.words, found, strict=True) if len(tokens) != 1]:
            raise TaskError(f"These words are not one token of this model's vocabulary: {some(several)}. Give others.")
        tokens = [token for (token,) in found]
        if len(set(tokens)) < len(tokens) or tokenizer.unk_token_id in tokens:
            raise TaskError(f"The words {some(list(self.words))} are not different tokens of this model's vocabulary.")
        return tokens

    def _fitted(self, tokenizer: Any, texts: tuple[str, ...], task: Task, room: int) -> tuple[list[int], bool]:
        """The tokens of a row, and whether its longest texts had to be cut."""
        left = list(texts)
        while True:
            tokens = self._tokens(tokenizer, left)
            over = len(tokens) - room
            if over <= 0:
                return tokens, tuple(left) != texts
            longest = max(range(len(left)), key=lambda i: len(left[i]))
            if not left[longest]:
                after = f" after {len(self.context):,} characters of examples in context" if self.context else ""
                raise TaskError(
                    f"max_length={room} leaves {task.name} no place for the pattern {short(self.pattern)}{after}."
                )
            size = len("".join(left)) + len(self.pattern)
            left[longest] = left[longest][: -max(1, over * size // len(tokens))]

    def _tokens(self, tokenizer: Any, texts: Sequence[str]) -> list[int]:
        text = self.context + self._text(texts, tokenizer.mask_token if self.masked else "")
        if self.masked:
            return tokenizer(text, verbose=False)["input_ids"]
        tokens = tokenizer(text.rstrip(" "), verbose=False)["input_ids"]
        return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] and len(tokens) > 1 else tokens

    def _text(self, texts: Sequence[str], blank: str) -> str:
        pieces = [piece.replace(BLANK, blank) for piece in self.pattern.split("{}")]
        return pieces[0] + "".join(text + piece for text, piece in zip(texts, pieces[1:], strict=True))

    def answered(self, example: Example) -> str:
        """A row as a text with the word of its class.

        >>> Cloze(pattern="{} It was", words=("bad", "good")).answered(Example(("No plot.",), 0))
        'No plot. It was bad'
        """
        word = self.words[example.label]
        if self.masked:
            return self._text(example.texts, word)
        text = self._text(example.texts, "").rstrip(" ")
        return text + (word if text.endswith("\n") else f" {word}")


def as_cloze(task: Task, pattern: str, words: tuple[str, ...], context: str = "") -> Task:
    """A task of classes as a cloze; see `Cloze`. `words`: one for each of its labels, in their order.

    Raises ConfigError for another kind of task, a pattern without a place for each text, and words that do not fit.

    >>> from selectune import tasks
    >>> tasks.as_cloze(tasks.get("glue/rte"), "{} {} True or False?", ("True", "False")).kind.name
    'cloze'
    """
    if any("\ud800" <= letter <= "\udfff" for letter in pattern + "".join(words)):
        raise ConfigError(f"The pattern {pattern!a} or its words {', '.join(map(ascii, words))} are no UTF-8.")
    if type(task.kind) is not Classification:
        raise ConfigError(f"A pattern is for a task of one class of several; {task.name} is a {task.kind.name}.")
    if pattern.count("{}") != len(task.fields) or pattern.count(BLANK) > 1:
        raise ConfigError(
            f"The pattern {short(pattern)} must have {{}} for each text of {task.name}, which are "
            f"{', '.join(task.fields)}, and {BLANK} once at most."
        )
    if len(words) != len(task.labels) or len(set(words)) < len(words) or not all(word.strip() for word in words):
        raise ConfigError(
            f"A pattern of {task.name} needs a word for each of its labels, all different: {', '.join(task.labels)}. "
            f"Got {', '.join(words) or 'none'}."
        )
    return dataclasses.replace(task, kind=Cloze(pattern=pattern, words=words, context=context))


def with_shots(task: Task, examples: Sequence[Example]) -> Task:
    """A cloze with these examples and their words before every row: learning in context, without training.

    Source: Brown et al. 2020, arXiv 2005.14165. Raises ConfigError for another kind of task, and for more than
    LONGEST characters, which a delta would have to keep.
    """
    if not isinstance(task.kind, Cloze):
        raise ConfigError(f"Examples in context (shots) need a pattern and words; {task.name} is a {task.kind.name}.")
    context = "".join(f"{task.kind.answered(example)}\n\n" for example in examples)
    if len(context) > LONGEST:
        raise ConfigError(
            f"{len(examples)} examples of {task.name} in context (shots) have {len(context):,} characters, and at most "
            f"{LONGEST:,} are kept. Give fewer."
        )
    return dataclasses.replace(task, kind=dataclasses.replace(task.kind, context=context))


@torch.no_grad()
def _looks_ahead(model: Any) -> bool:
    """Whether the first token's logits depend on the last token."""
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        first = model(input_ids=ids).logits[:, 0]
    finally:
        model.train(training)
    return bool((first[0] - first[1]).abs().max() > 8 * torch.finfo(first.dtype).eps * first.abs().max())


def _at_blanks(logits: Tensor, asked: Tensor) -> Tensor:
    """The logits of the words at each row's blank: (rows, tokens, vocabulary) -> (rows, classes), float32."""
    blanks = logits[torch.arange(len(asked), device=logits.device), asked[:, 0]]
    return blanks.gather(1, asked[:, 1:]).float()
