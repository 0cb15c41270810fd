"""Plain language modelling: a text, token after token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selectune.errors import TaskError
from selectune.tasks.kinds.token_losses import summed_losses
from selectune.tasks.task import ANSWER, Example, Features, Head, Row, Task, filled, texts_of, to_model, token_batch


@dataclass(frozen=True)
class Language:
    """Texts as one stream of tokens, cut into blocks of `max_length`, by AutoModelForCausalLM.

    Each text is tokenized by itself, with `between` at the end of all but the last, and without special tokens. The
    stream is cut into pieces of `max_length` - 1 tokens, and a block is a piece after the token before it, which is
    given and not predicted. Before the first piece that is the token that begins a text, if the tokenizer puts one
    there (then it begins every block), or else the stream's own first token. So every other token of the texts is
    predicted once, also those of the last block, which may be short.

    A prediction is the sum of a block's losses, in nats, and the answer is the number of tokens that it predicts.

    >>> from selectune import tasks
    >>> tasks.get("text/wikitext2").kind.name
    'language'
    """

    name: str = "language"
    batch: int = 8
    between: str = "\n\n"

    def head(self, task: Task) -> Head:
        return Head("AutoModelForCausalLM")

    def example(self, task: Task, row: Row, where: str) -> Example:
        return Example(texts_of(task, row, where), None)

    def encode(self, task: Task, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Features]:
        texts = ["\n".join(example.texts) for example in examples]
        texts = [text + self.between for text in texts[:-1]] + texts[-1:]
        rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        stream = [token for row in rows for token in row]
        begin = tokenizer("", verbose=False)["input_ids"]
        own = begin if begin == [tokenizer.bos_token_id] else []
        if max_length < 2 or len(own) + len(stream) < 2:
            raise TaskError(
                f"{task.name} needs blocks of at least 2 tokens and as many tokens of text; "
                f"max_length={max_length}, and the text has {len(stream)} tokens."
            )
        first = len(stream) if own else len(stream) - 1
        blocks = [
            [*(own or stream[start - 1 : start]), *stream[start : start + max_length - 1]]
            for start in range(len(stream) - first, len(stream), max_length - 1)
        ]
        return [{"input_ids": block, ANSWER: len(block) - 1} for block in blocks]

    def collate(self, tokenizer: Any, rows: Sequence[Features]) -> dict[str, Tensor]:
        tokens = [row["input_ids"] for row in rows]
        return {**token_batch(tokenizer, tokens), "labels": filled(tokens, -100)}

    def predict(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        batch = self.collate(tokenizer, rows)
        on_device = to_model(model, batch)
        return summed_losses(model, on_device, batch["labels"].to(on_device["input_ids"].device))
