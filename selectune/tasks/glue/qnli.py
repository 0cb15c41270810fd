"""QNLI: does the sentence answer the question?"""

from __future__ import annotations

from selectune.tasks.common import Task
from selectune.tasks.glue import on_hub
from selectune.tasks.metrics import accuracy

QNLI = Task(
    name="glue/qnli",
    fields=("question", "sentence"),
    kind="classification",
    labels=("entailment", "not_entailment"),
    metric=accuracy,
    metric_name="accuracy",
    chance=0.505,
    source="SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250) in GLUE, arXiv 1804.07461; CC BY-SA 4.0",
    epochs=7,
    eval_every=1000,
    hub=on_hub("qnli"),
    folders=("glue/qnli",),
)
