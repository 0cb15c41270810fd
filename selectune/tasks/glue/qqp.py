"""QQP: do two questions ask the same? Accuracy, as in the papers, not F1."""

from __future__ import annotations

from selectune.tasks.common import Task
from selectune.tasks.glue import on_hub
from selectune.tasks.metrics import accuracy

QQP = Task(
    name="glue/qqp",
    fields=("question1", "question2"),
    kind="classification",
    labels=("not_duplicate", "duplicate"),
    metric=accuracy,
    metric_name="accuracy",
    chance=0.632,
    source="Quora Question Pairs 2017, in GLUE, arXiv 1804.07461; Quora terms, no commercial use",
    epochs=3,
    eval_every=4000,
    hub=on_hub("qqp"),
    folders=("glue/qqp",),
)
