"""What a tuned model lost elsewhere: the loss per token of a text that it was not tuned on, after minus before.

So does peft's method comparison define forgetting (github.com/huggingface/peft, method_comparison). The loss is that of
the checkpoint's own language model. If the tuned model has another head, a classifier's, the head for language is read
from the checkpoint and put on the tuned trunk. An encoder's loss is that of masked tokens (Devlin et al. 2019, arXiv
1810.04805): 15 % of the tokens of a block, drawn once, are hidden behind the mask token and predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from selectune import tasks
from selectune.errors import ConfigError, ModelError, TaskError
from selectune.files import read_owned
from selectune.models.bases import LoadedModel, device, load_model, longest
from selectune.models.evaluate import Retention, evaluate
from selectune.tasks import ANSWER, Example, Features, Head, Language, Split, Task

TOKENS = 8_192
"""The first tokens of a text, as many as are measured."""
LENGTH = 256
LARGEST = 64 << 20
"""Bytes of a text file."""
MASKED = 0.15


def text_of(name: str, data: str | None = None) -> tuple[str, Split]:
    """The name and the rows of a held-out text: the validation split of a task of texts, or a file of UTF-8.

    Raises ConfigError for a name that is neither, TaskError for rows that cannot be read.
    """
    path = Path(name).expanduser()
    known = [task.name for task in tasks.TASKS.values() if isinstance(task.kind, Language)]
    found = next((task for task in known if name in (task, task.partition("/")[2])), None)
    if found is not None:
        return found, tasks.load(tasks.get(found), "validation", data)
    if not path.is_file():
        raise ConfigError(f"retain={name} is neither a text file nor one of {', '.join(known)}.")
    try:
        text = read_owned(path, LARGEST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TaskError(f"The text {path} is not UTF-8: {error.reason} at byte {error.start}.") from error
    return path.name, Split((Example((text,), None),), str(path))


@dataclass(frozen=True)
class HeldOut:
    """A held-out text as a model reads it. `lm`: the checkpoint's language model, if the tuned one has another head."""

    name: str
    task: Task
    tokenizer: Any
    rows: Sequence[Features]
    lm: Any = None

    def loss(self, model: Any) -> float:
        """The mean loss of a token, in nats."""
        with _on_device(model), self._with_trunk_of(model) as measured:
            return evaluate(measured, self.tokenizer, self.task, self.rows).value

    def retention(self, before: float, after: float) -> Retention:
        return Retention(self.name, sum(row[ANSWER] for row in self.rows), before, after)

    @contextmanager
    def _with_trunk_of(self, model: Any) -> Iterator[Any]:
        """Within it, the language model has this model's trunk, and ties its own weights to it as ever."""
        if self.lm is None:
            yield model
            return
        place, own = self.lm.base_model_prefix, self.lm.base_model
        self.lm.to(next(model.parameters()).device)
        try:
            setattr(self.lm, place, model.base_model)
            self.lm.tie_weights()
            yield self.lm
        finally:
            setattr(self.lm, place, own)
            self.lm.tie_weights()


def held_out(name: str, rows: Split, loaded: LoadedModel, model: str, **options: Any) -> HeldOut:
    """A text for this model, which must have no adapter yet; `model` and `options` are those of `load_model`.

    Raises ModelError if the checkpoint has no head for language, TaskError if the text is too short.
    """
    tuned, tokenizer = loaded.model, loaded.tokenizer
    masked, head = _head(loaded)
    own = type(tuned).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM"))
    lm = None
    if not own:
        found = load_model(model, head, loaded.seed, dtype=tuned.dtype, tokenizer=False, **options)
        if found.initialised:
            raise ModelError(
                f"Retention needs a language model, and the checkpoint of '{loaded.id}' has none: "
                f"{', '.join(found.initialised[:3])} are not in it. Without retain nothing of it is needed."
            )
        lm = found.model
    kind = MaskedText() if masked else Language()
    task = Task(
        name=name, fields=("text",), kind=kind, labels=(), metric=_mean, metric_name="loss", chance=None,
        source=rows.origin, epochs=1, eval_every=1, max_length=LENGTH, label="text", lower_is_better=True,
    )  # fmt: skip
    encoded = task.encode(tokenizer, rows.examples, longest(tuned, tokenizer, None, LENGTH))
    size = len(encoded[0]["input_ids"])
    return HeldOut(name, task, tokenizer, encoded[: max(1, TOKENS // size)], lm)


@dataclass(frozen=True)
class MaskedText(Language):
    """Blocks of text with hidden tokens, by AutoModelForMaskedLM. The answer is the number of hidden tokens."""

    name: str = "masked"

    def encode(self, task: Task, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Features]:
        texts = [text + self.between for example in examples for text in example.texts]
        stream = [t for row in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for t in row]
        begin, *end = tokenizer("", verbose=False)["input_ids"]  # [CLS] and [SEP]
        room = max_length - 1 - len(end)
        if room < 1 or not stream:
            raise TaskError(f"{task.name} needs text and blocks of more than {max_length} tokens.")
        draws = torch.Generator().manual_seed(0)
        rows = []
        for start in range(0, len(stream), room):
            piece = stream[start : start + room]
            hidden = torch.randperm(len(piece), generator=draws)[: max(1, round(MASKED * len(piece)))].tolist()
            shown, labels = list(piece), [-100] * len(piece)
            for i in hidden:
                shown[i], labels[i] = tokenizer.mask_token_id, piece[i]
            labels = [-100, *labels, *([-100] * len(end))]
            rows.append({"input_ids": [begin, *shown, *end], "labels": labels, ANSWER: len(hidden)})
        return rows

    def predict(self, task: Task, model: Any, tokenizer: Any, rows: Sequence[Features]) -> list[Any]:
        where, losses = next(model.parameters()).device, []
        for row in rows:  # one by one: whole logits of a batch would be large
            ids, labels = (torch.tensor([row[name]], device=where) for name in ("input_ids", "labels"))
            logits = model(input_ids=ids).logits
            losses.append(F.cross_entropy(logits[0].double(), labels[0], reduction="sum").item())
        return losses


def _head(loaded: LoadedModel) -> tuple[bool, Head]:
    """Whether the checkpoint's language model predicts masked tokens, and its class."""
    import transformers

    config, kind = loaded.model.config, type(loaded.model.config)
    if not getattr(config, "is_encoder_decoder", False):
        if kind in transformers.MODEL_FOR_MASKED_LM_MAPPING and loaded.tokenizer.mask_token_id is not None:
            return True, Head("AutoModelForMaskedLM")
        if kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            return False, Head("AutoModelForCausalLM")
    raise ModelError(
        f"Retention is the loss of a causal or a masked language model, and '{loaded.id}' ({config.model_type}) is "
        "neither. Without retain nothing of it is needed."
    )


def _mean(predictions: Sequence[float], labels: Sequence[int]) -> float:
    return math.fsum(predictions) / sum(labels)


@contextmanager
def _on_device(model: Any) -> Iterator[None]:
    """Within it the model is on the command line's device."""
    before = next(model.parameters()).device
    model.to(device())
    try:
        yield
    finally:
        model.to(before)
