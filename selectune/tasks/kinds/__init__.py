"""The kinds of tasks: which head a model gets, and how rows are encoded, collated and predicted.

classify  one or two texts -> a class, a score, or any number of labels
"""

from selectune.tasks.kinds.classify import Classification, Multilabel, Regression
from selectune.tasks.task import TaskKind

KINDS: dict[str, TaskKind] = {kind.name: kind for kind in (Classification(), Regression(), Multilabel())}
"""The kinds by name, as `--kind` takes them."""

__all__ = ["KINDS", "Classification", "Multilabel", "Regression"]
