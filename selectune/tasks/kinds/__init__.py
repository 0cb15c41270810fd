"""The kinds of tasks: which head a model gets, and how rows are encoded, collated and predicted.

classify    one or two texts -> a class or a score
tagging     words -> a tag for each
"""

from selectune.tasks.kinds.classify import Classification, Regression
from selectune.tasks.kinds.tagging import Tagging

__all__ = ["Classification", "Regression", "Tagging"]
