"""Tasks of going on with a prompt, by a causal language model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selectune.errors import TaskError
from selectune.tasks.kinds.generating import Generating, answer_of, first_reference, needs_end
from selectune.tasks.kinds.token_losses import summed_losses
from selectune.tasks.task import ANSWER, Example, Features, Head, Task, filled, to_model, token_batch

log = logging.getLogger("selectune")

COMPLETION, SEEN = "completion", "seen"  # of a row of features: its tokens, and how many of the prompt come before them


@dataclass(frozen=True)
class Completion(Generating):
    """A text that follows a prompt, by AutoModelForCausalLM.

    The prompt: the texts of a row are put into `prompt`, one for each `{}`; without it there is a line for each. If the
    tokenizer has a chat template and `chat` is True, that is what a user says, and the answer of the assistant begins.
    Otherwise it is put into `plain`. Prompt and completion are tokenized apart, so a prompt has the same tokens with
    and without its completion.

    The loss is on the completion and the end of text after it; the prompt's labels are -100. Prompt and completion have
    `max_length` tokens together: a prompt that is too long loses its beginning, but not the token that begins a text.
    A completion that is too long by itself loses its end. Log lines count both. In generation the prompt alone has
    `max_length` tokens, fewer if the model's positions would not hold its answer as well.

    >>> from selectune import tasks
    >>> tasks.get("math/gsm8k").kind.plain
    '### Instruction:\\n{}\\n\\n### Response:\\n'
    """

    name: str = "completion"
    prompt: str | None = None
    plain: str = "{}\n"
    chat: bool = True

    def head(self, task: Task) -> Head:
        return Head("AutoModelForCausalLM")

    def encode(self, task: Task, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Features]:
        needs_end(task, tokenizer)
        if max_length < 2:
            raise TaskError(f"max_length={max_length} leaves {task.name} no place for a prompt and a completion.")
        prompts = self._prompts(tokenizer, [example.texts for example in examples])
        texts = [first_reference(example.label) for example in examples]
        ends = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        rows, cut, ended = [], 0, 0
        for example, prompt, end in zip(examples, prompts, ends, strict=True):
            completion = [*end, tokenizer.eos_token_id]
            ended += len(completion) >= max_length
            completion = completion[: max_length - 1]
            seen = min(len(prompt), max_length - len(completion))
            cut += seen < len(prompt)
            whole = _last(prompt, max_length, tokenizer)
            rows.append({"input_ids": whole, COMPLETION: completion, SEEN: seen, ANSWER: answer_of(example.label)})
        if cut:
            log.warning(
                "%d of %d prompts of %s lose their beginning: prompt and completion have max_length=%d tokens.",
                cut, len(rows), task.name, max_length,
            )  # fmt: skip
        if ended:
            log.warning(
                "%d of %d completions of %s lose their end, with the end of text: they are longer than max_length=%d.",
                ended, len(rows), task.name, max_length,
            )  # fmt: skip
        return rows

    def collate(self, tokenizer: Any, rows: Sequence[Features]) -> dict[str, Tensor]:
        prompts = [_last(row["input_ids"], row[SEEN], tokenizer) for row in rows]
        whole = [prompt + row[COMPLETION] for prompt, row in zip(prompts, rows, strict=True)]
        labels = [[-100] * len(prompt) + row[COMPLETION] for prompt, row in zip(prompts, rows, strict=True)]
        return {**token_batch(tokenizer, whole), "labels": filled(labels, -100)}

    def predict(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        self.fits(task, model)
        positions = getattr(model.config, "max_position_embeddings", None)
        prompts = [row["input_ids"] for row in rows]
        if positions is not None:
            room = positions - self.max_new_tokens
            if (cut := sum(len(prompt) > room for prompt in prompts)) > 0:
                log.warning(
                    "%d of %d prompts of %s lose their beginning: the model has %d positions, and %d are for answers.",
                    cut, len(rows), task.name, positions, self.max_new_tokens,
                )  # fmt: skip
            prompts = [_last(prompt, room, tokenizer) for prompt in prompts]
        batch = token_batch(tokenizer, prompts, left=True)
        return self.generated(model, tokenizer, to_model(model, batch), batch["input_ids"].shape[1])

    def _prompts(self, tokenizer: Any, rows: Sequence[tuple[str, ...]]) -> list[list[int]]:
        """The tokens of each prompt. No end of text is at its end, even if the tokenizer puts one everywhere."""
        said = ["\n".join(texts) if self.prompt is None else self.prompt.format(*texts) for texts in rows]
        chat = self.chat and getattr(tokenizer, "chat_template", None) is not None
        if chat:
            turns = [[{"role": "user", "content": text}] for text in said]
            said = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
        else:
            said = [self.plain.format(text) for text in said]
        found = tokenizer(said, add_special_tokens=not chat, verbose=False)["input_ids"]
        found = [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and not chat else ids for ids in found]
        if not all(found):
            raise TaskError(f"The prompt {said[found.index([])]!r:.80} has no token in this model's vocabulary.")
        return found


@dataclass(frozen=True)
class CompletionLoss(Completion):
    """The loss of a completion instead of a generated one: its negative log-likelihood in nats, over its tokens.

    Predictions are sums over the tokens of a row, and answers the numbers of these tokens, the end of text with them.

    >>> from selectune import tasks
    >>> tasks.get("math/gsm8k-loss").metric_name
    'perplexity'
    """

    name: str = "completion-loss"

    def fits(self, task: Task, model: Any) -> None:
        pass  # nothing is generated

    def encode(self, task: Task, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Features]:
        rows = super().encode(task, tokenizer, examples, max_length)
        return [{**row, ANSWER: len(row[COMPLETION])} for row in rows]

    def predict(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        batch = self.collate(tokenizer, rows)
        on_device = to_model(model, batch)
        return summed_losses(model, on_device, batch["labels"].to(on_device["input_ids"].device))


def _last(prompt: list[int], room: int, tokenizer: Any) -> list[int]:
    """The last `room` tokens of a prompt, of which the first is still the token that begins a text, if there is one."""
    if len(prompt) <= room:
        return prompt
    kept = prompt[len(prompt) - room :]
    return [prompt[0], *kept[1:]] if prompt[0] == tokenizer.bos_token_id and room > 1 else kept
