"""The GLUE tasks of the papers as a table, with the papers' metrics and settings (arXiv 2408.14470, appendix)."""

from __future__ import annotations

import dataclasses
from typing import Any

from selectune.tasks.kinds import Classification, Regression
from selectune.tasks.metrics import accuracy, matthews, pearson_spearman
from selectune.tasks.task import Hub, Task

REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
"""A commit of `nyu-mll/glue` on the hub, so that rows never change."""


def _task(
    name: str, fields: str, labels: str, chance: float, epochs: int, eval_every: int, source: str, **more: Any
) -> Task:
    """A row of the table: class names and fields are written with spaces between them."""
    settings = {"metric": accuracy, "metric_name": "accuracy", "kind": Classification(), "folders": (f"glue/{name}",)}
    return Task(
        name=f"glue/{name}",
        fields=tuple(fields.split()),
        labels=tuple(labels.split()),
        chance=chance,
        source=source,
        epochs=epochs,
        eval_every=eval_every,
        hub=Hub("nyu-mll/glue", name, REVISION),
        **(settings | more),
    )


COLA = _task(  # is this sentence acceptable English?
    "cola", "sentence", "unacceptable acceptable", 0.0, 20, 200,
    "Warstadt, Singh, Bowman 2019, arXiv 1805.12471; text of published linguistics, research use",
    metric=matthews, metric_name="Matthews correlation",
)  # fmt: skip
MRPC = _task(  # do two sentences say the same? Accuracy, as in the papers, not F1
    "mrpc", "sentence1 sentence2", "not_equivalent equivalent", 0.684, 30, 100,
    "Dolan, Brockett 2005, ACL I05-5002; research use",
)  # fmt: skip
RTE = _task(  # does the first sentence entail the second?
    "rte", "sentence1 sentence2", "entailment not_entailment", 0.527, 30, 100,
    "PASCAL RTE 1, 2, 3, 5 (Dagan et al. 2006, and later) in GLUE, arXiv 1804.07461; research use",
)  # fmt: skip
STSB = _task(  # how similar are two sentences, from 0 to 5?
    "stsb", "sentence1 sentence2", "", 0.0, 15, 200,
    "Cer et al. 2017, arXiv 1708.00055; scores CC BY-SA 4.0, texts under their own terms",
    kind=Regression(), metric=pearson_spearman, metric_name="mean of Pearson and Spearman",
)  # fmt: skip
SST2 = _task(  # is a phrase of a film review positive?
    "sst2", "sentence", "negative positive", 0.509, 7, 500,
    "Socher et al. 2013, ACL D13-1170; film reviews, research use",
)  # fmt: skip
QNLI = _task(  # does the sentence answer the question?
    "qnli", "question sentence", "entailment not_entailment", 0.505, 7, 1000,
    "SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250) in GLUE, arXiv 1804.07461; CC BY-SA 4.0",
)  # fmt: skip
QQP = _task(  # do two questions ask the same? Accuracy, as in the papers, not F1
    "qqp", "question1 question2", "not_duplicate duplicate", 0.632, 3, 4000,
    "Quora Question Pairs 2017, in GLUE, arXiv 1804.07461; Quora terms, no commercial use",
)  # fmt: skip
MNLI = _task(  # entailment, neutral or contradiction; validated on the genres of training
    "mnli", "premise hypothesis", "entailment neutral contradiction", 0.354, 3, 4000,
    "Williams, Nangia, Bowman 2018, arXiv 1704.05426; OANC and other open terms",
    folders=("glue/mnli", "nli/mnli"), validation="validation_matched",
)  # fmt: skip
MNLI_MM = dataclasses.replace(MNLI, name="glue/mnli-mm", chance=0.352, validation="validation_mismatched")

GLUE = (COLA, MRPC, RTE, STSB, SST2, QNLI, QQP, MNLI, MNLI_MM)
