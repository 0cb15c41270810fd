"""MNLI: entailment, neutral or contradiction; validated on the genres of training, and (mm) on others."""

from __future__ import annotations

import dataclasses

from selectune.tasks.common import Task
from selectune.tasks.glue import on_hub
from selectune.tasks.metrics import accuracy

MNLI = Task(
    name="glue/mnli",
    fields=("premise", "hypothesis"),
    kind="classification",
    labels=("entailment", "neutral", "contradiction"),
    metric=accuracy,
    metric_name="accuracy",
    chance=0.354,
    source="Williams, Nangia, Bowman 2018, arXiv 1704.05426; OANC and other open terms",
    epochs=3,
    eval_every=4000,
    hub=on_hub("mnli"),
    folders=("glue/mnli", "nli/mnli"),
    validation="validation_matched",
)

MNLI_MM = dataclasses.replace(MNLI, name="glue/mnli-mm", chance=0.352, validation="validation_mismatched")
