"""SST-2: is a phrase of a film review positive?"""

from __future__ import annotations

from selectune.tasks.common import Task
from selectune.tasks.glue import on_hub
from selectune.tasks.metrics import accuracy

SST2 = Task(
    name="glue/sst2",
    fields=("sentence",),
    kind="classification",
    labels=("negative", "positive"),
    metric=accuracy,
    metric_name="accuracy",
    chance=0.509,
    source="Socher et al. 2013, ACL D13-1170; film reviews, research use",
    epochs=7,
    eval_every=500,
    hub=on_hub("sst2"),
    folders=("glue/sst2",),
)
