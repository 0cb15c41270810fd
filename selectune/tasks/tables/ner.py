"""Named entities in sentences, with the papers' metric and settings (arXiv 2408.14470, appendix): entity F1."""

from __future__ import annotations

from selectune.tasks.kinds import Tagging
from selectune.tasks.metrics import entity_f1
from selectune.tasks.task import Task

_NAMES = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")


def _task(name: str, labels: tuple[str, ...], source: str, folder: str) -> Task:
    return Task(
        name=f"ner/{name}",
        fields=("tokens",),
        label="ner_tags",
        kind=Tagging(),
        labels=labels,
        metric=entity_f1,
        metric_name="f1",
        chance=0.0,
        source=source,
        epochs=20,
        eval_every=300,
        max_length=384,
        folders=(f"ner/{folder}",),
    )


CONLL2003 = _task(
    "conll2003", (*_NAMES, "B-MISC", "I-MISC"),
    "Tjong Kim Sang, De Meulder 2003, ACL W03-0419; Reuters news, research use", "conll2003",
)  # fmt: skip
WIKIANN = _task(  # English
    "wikiann", _NAMES,
    "Pan et al. 2017, ACL P17-1178, balanced by Rahimi et al. 2019, arXiv 1902.00193; Wikipedia text", "wikiann_en",
)  # fmt: skip

NER = (CONLL2003, WIKIANN)
