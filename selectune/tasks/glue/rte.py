"""RTE: does the first sentence entail the second?"""

from __future__ import annotations

from selectune.tasks.common import Task
from selectune.tasks.glue import on_hub
from selectune.tasks.metrics import accuracy

RTE = Task(
    name="glue/rte",
    fields=("sentence1", "sentence2"),
    kind="classification",
    labels=("entailment", "not_entailment"),
    metric=accuracy,
    metric_name="accuracy",
    chance=0.527,
    source="PASCAL RTE 1, 2, 3, 5 (Dagan et al. 2006, and later) in GLUE, arXiv 1804.07461; research use",
    epochs=30,
    eval_every=100,
    hub=on_hub("rte"),
    folders=("glue/rte",),
)
