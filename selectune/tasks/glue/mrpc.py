"""MRPC: do two sentences say the same? Accuracy, as in the papers, not F1."""

from __future__ import annotations

from selectune.tasks.common import Task
from selectune.tasks.glue import on_hub
from selectune.tasks.metrics import accuracy

MRPC = Task(
    name="glue/mrpc",
    fields=("sentence1", "sentence2"),
    kind="classification",
    labels=("not_equivalent", "equivalent"),
    metric=accuracy,
    metric_name="accuracy",
    chance=0.684,
    source="Dolan, Brockett 2005, ACL I05-5002; research use",
    epochs=30,
    eval_every=100,
    hub=on_hub("mrpc"),
    folders=("glue/mrpc",),
)
