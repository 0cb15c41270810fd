"""What a question or a piece of news is about. They are short and have several classes; no seed paper has them."""

from __future__ import annotations

from selectune.tasks.kinds import Classification
from selectune.tasks.metrics import accuracy
from selectune.tasks.task import Task


def _task(name: str, labels: str, chance: float, epochs: int, source: str) -> Task:
    return Task(
        name=f"classification/{name}",
        fields=("text",),
        kind=Classification(),
        labels=tuple(labels.split()),
        metric=accuracy,
        metric_name="accuracy",
        chance=chance,
        source=source,
        epochs=epochs,
        eval_every=200,
        folders=(f"classification/{name}",),
        validation="test",
    )


TREC = _task(  # the kind of answer that a question asks for
    "trec", "abbreviation entity description human location number", 0.276, 5,
    "Li, Roth 2002, ACL C02-1150; questions of TREC, no licence stated",
)  # fmt: skip
AG_NEWS = _task(
    "ag_news", "world sports business science", 0.25, 2,
    "Zhang, Zhao, LeCun 2015, arXiv 1509.01626; news of AG's corpus, no commercial use",
)  # fmt: skip

SUBJECTS = (TREC, AG_NEWS)
