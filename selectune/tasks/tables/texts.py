"""Texts for plain language modelling, measured by perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selectune.tasks.kinds import Language
from selectune.tasks.metrics import perplexity
from selectune.tasks.task import Example, Hub, Task


def _task(name: str, source: str, **more: Any) -> Task:
    return Task(
        name=f"text/{name}",
        fields=("text",),
        kind=Language(),
        labels=(),
        metric=perplexity,
        metric_name="perplexity",
        chance=None,
        source=source,
        epochs=1,
        eval_every=200,
        max_length=512,
        folders=(f"text/{name}",),
        label="text",
        lower_is_better=True,
        **more,
    )


def last_tenth(examples: Sequence[Example], split: str) -> list[Example]:
    """The last tenth of each text's characters for validation, and what is before it for training.

    >>> last_tenth([Example(("abcdefghij",), None)], "validation")
    [Example(texts=('j',), label=None)]
    """
    cuts = [[(text, len(text) * 9 // 10) for text in example.texts] for example in examples]
    if split == "train":
        return [Example(tuple(text[:at] for text, at in cut), None) for cut in cuts]
    return [Example(tuple(text[at:] for text, at in cut), None) for cut in cuts]


WIKITEXT2 = _task(  # a row of the hub is a line, and one of the folder an article, so their blocks differ
    "wikitext2",
    "Merity, Xiong, Bradbury, Socher 2016, arXiv 1609.07843; Wikipedia, CC BY-SA; rare words are <unk>",
    hub=Hub("Salesforce/wikitext", "wikitext-2-v1", "b08601e04326c79dfdd32d625aee71d232d685c3"),
)
TINYSHAKESPEARE = _task(
    "tinyshakespeare", "Karpathy 2015, char-rnn; Shakespeare's plays, public domain; the last tenth is for validation",
    train="all", validation="all", arrange=last_tenth,
)  # fmt: skip
ENGLISH_NOVELS = _task(
    "english_novels",
    "Computational Stylistics Group, 100 English novels; those published by 1927, public domain in the US",
)

TEXTS = (WIKITEXT2, TINYSHAKESPEARE, ENGLISH_NOVELS)
