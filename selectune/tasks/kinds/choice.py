"""Multiple choice by likelihood: which of several texts goes on from a prompt?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selectune.errors import TaskError
from selectune.tasks.kinds.token_losses import summed_losses
from selectune.tasks.task import ANSWER, Example, Features, Head, Row, Task, filled, to_model, token_batch

log = logging.getLogger("selectune")


@dataclass(frozen=True)
class Choice:
    """One of several texts after a prompt, by the log-likelihood that AutoModelForCausalLM gives it.

    The first field of a row is the prompt, the second a list of choices, and the label is the number of the right one.
    What is scored is the choice after the prompt, with a space between them unless the prompt ends with one or is
    empty. With `partial` the prompt has a blank, "_": what stands before it and the choice are given, and what stands
    after it is scored (Trinh, Le 2018, arXiv 1806.02847).

    The prompt is tokenized alone and with the choice after it. The choice begins where these tokens part, so a token
    across the border belongs to it. A text that is longer than `max_length` loses tokens at its start, and a log line
    counts such texts; a choice is never cut.

    Training reads the right choice only; the prompt's labels are -100. A prediction is, for each choice, the sum of its
    log-likelihoods and its number of characters.

    >>> from selectune import tasks
    >>> tasks.get("commonsense/winogrande").kind.partial
    True
    """

    name: str = "choice"
    batch: int = 8
    partial: bool = False

    def head(self, task: Task) -> Head:
        return Head("AutoModelForCausalLM")

    def example(self, task: Task, row: Row, where: str) -> Example:
        wanted = (*task.fields, task.label)
        if missing := [name for name in wanted if name not in row]:
            raise TaskError(
                f"{where}: a row of {task.name} needs {', '.join(wanted)}; missing: {', '.join(missing)}. "
                f"Got {', '.join(map(str, row)) or 'nothing'}."
            )
        prompt, choices, label = row[task.fields[0]], row[task.fields[1]], row[task.label]
        if not isinstance(choices, list | tuple) or not all(isinstance(text, str) for text in (prompt, *choices)):
            raise TaskError(
                f"{where}: {task.fields[0]} of {task.name} must be a string and {task.fields[1]} a list of strings, "
                f"got {prompt!r:.60} and {choices!r:.60}."
            )
        if len(choices) < 2 or not all(text.strip() for text in choices):
            raise TaskError(f"{where}: {task.name} needs two choices or more, none of them empty, got {choices!r:.80}.")
        if type(label) is not int or label not in range(len(choices)):
            raise TaskError(f"{where}: the label of {task.name} must be 0 to {len(choices) - 1}, got {label!r:.80}.")
        if self.partial and (prompt.count("_") != 1 or not prompt.partition("_")[2].strip()):
            raise TaskError(f"{where}: {task.fields[0]} of {task.name} needs one blank, _, and text after it.")
        return Example((prompt, *choices), label)

    def encode(self, task: Task, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Features]:
        pairs = [self._pair(e.texts[0], choice) for e in examples for choice in e.texts[1:]]
        before = tokenizer([given or " " for given, _ in pairs], verbose=False)["input_ids"]
        whole = tokenizer([given + scored for given, scored in pairs], verbose=False)["input_ids"]
        found, cut = [], 0
        for (given, scored), alone, tokens in zip(pairs, before, whole, strict=True):
            start = _shared(alone, tokens) if given else 0
            if start == 0:  # a first token needs one before it
                tokens, start = [_begin(tokenizer), *tokens], 1
            drop = max(0, len(tokens) - max_length)
            if start - drop < 1:
                raise TaskError(
                    f"A choice of {task.name} has {len(tokens) - start} tokens and needs one before it, which is more "
                    f"than max_length={max_length}: {scored!r:.60}."
                )
            cut += drop > 0
            found.append((tokens[drop:], start - drop, len(scored.strip())))
        if cut:
            log.warning("%d of %d texts of %s lose their start: they are longer than max_length=%d.", cut, len(pairs),
                        task.name, max_length)  # fmt: skip
        rows, at = [], iter(found)
        for example in examples:
            tokens, starts, characters = map(list, zip(*(next(at) for _ in example.texts[1:]), strict=True))
            right = {"input_ids": tokens[example.label], "start": starts[example.label]}
            scored = {"choices": tokens, "starts": starts, "characters": characters, "texts": list(example.texts[1:])}
            rows.append({**right, **scored, ANSWER: example.label})
        return rows

    def _pair(self, prompt: str, choice: str) -> tuple[str, str]:
        """What is given and what is scored."""
        if self.partial:
            before, _, after = prompt.partition("_")
            return before + choice, after
        return prompt, choice if not prompt or prompt[-1].isspace() else f" {choice}"

    def collate(self, tokenizer: Any, rows: Sequence[Features]) -> dict[str, Tensor]:
        return _labelled(tokenizer, [row["input_ids"] for row in rows], [row["start"] for row in rows])

    def predict(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        texts = [tokens for row in rows for tokens in row["choices"]]
        batch = _labelled(tokenizer, texts, [start for row in rows for start in row["starts"]])
        on_device = to_model(model, batch)
        losses = iter(summed_losses(model, on_device, batch["labels"].to(on_device["input_ids"].device)))
        return [[(-next(losses), characters) for characters in row["characters"]] for row in rows]

    def answers(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        """For each row the likeliest choice, its number, and all log-likelihoods in nats, for `selectune predict`."""
        found = []
        for row, choices in zip(rows, self.predict(task, model, tokenizer, rows), strict=True):
            sums = [total for total, _ in choices]
            number = sums.index(max(sums))
            found.append({"choice": row["texts"][number], "number": number, "log_likelihoods": sums})
        return found


def _labelled(tokenizer: Any, rows: Sequence[list[int]], starts: Sequence[int]) -> dict[str, Tensor]:
    labels = [[-100] * start + row[start:] for row, start in zip(rows, starts, strict=True)]
    return {**token_batch(tokenizer, rows), "labels": filled(labels, -100)}


def _shared(alone: list[int], whole: list[int]) -> int:
    """The number of tokens that both begin with, less than all of `whole`."""
    pairs = zip(alone, whole[:-1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(alone), len(whole) - 1))


def _begin(tokenizer: Any) -> int:
    """The token that begins a text, or the one that ends the text before it."""
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if found is None:
        raise TaskError(f"A choice without a prompt needs a tokenizer with bos_token or eos_token; "
                        f"{type(tokenizer).__name__} has neither.")  # fmt: skip
    return found
