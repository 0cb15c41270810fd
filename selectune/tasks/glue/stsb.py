"""STS-B: how similar are two sentences, from 0 to 5?"""

from __future__ import annotations

from selectune.tasks.common import Task
from selectune.tasks.glue import on_hub
from selectune.tasks.metrics import pearson_spearman

STSB = Task(
    name="glue/stsb",
    fields=("sentence1", "sentence2"),
    kind="regression",
    labels=(),
    metric=pearson_spearman,
    metric_name="mean of Pearson and Spearman",
    chance=0.0,
    source="Cer et al. 2017, arXiv 1708.00055; scores CC BY-SA 4.0, texts under their own terms",
    epochs=15,
    eval_every=200,
    hub=on_hub("stsb"),
    folders=("glue/stsb",),
)
