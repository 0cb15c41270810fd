"""The kinds of tasks: which head a model gets, and how rows are encoded, collated and predicted.

classify  one or two texts -> a class or a score
"""

from selectune.tasks.kinds.classify import Classification, Regression

__all__ = ["Classification", "Regression"]
