"""The kinds of tasks: which head a model gets, and how rows are encoded, collated and predicted.

classify      one or two texts -> a class or a score
language      a text, token after token
choice        a prompt and several texts -> the likeliest of them
token_losses  the losses of tokens, with few logits at once
"""

from selectune.tasks.kinds.choice import Choice
from selectune.tasks.kinds.classify import Classification, Regression
from selectune.tasks.kinds.language import Language

__all__ = ["Choice", "Classification", "Language", "Regression"]
