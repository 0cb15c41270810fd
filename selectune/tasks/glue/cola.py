"""CoLA: is this sentence acceptable English?"""

from __future__ import annotations

from selectune.tasks.common import Task
from selectune.tasks.glue import on_hub
from selectune.tasks.metrics import matthews

COLA = Task(
    name="glue/cola",
    fields=("sentence",),
    kind="classification",
    labels=("unacceptable", "acceptable"),
    metric=matthews,
    metric_name="Matthews correlation",
    chance=0.0,
    source="Warstadt, Singh, Bowman 2019, arXiv 1805.12471; text of published linguistics, research use",
    epochs=20,
    eval_every=200,
    hub=on_hub("cola"),
    folders=("glue/cola",),
)
