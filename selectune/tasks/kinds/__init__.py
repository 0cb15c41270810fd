"""The kinds of tasks: which head a model gets, and how rows are encoded, collated and predicted.

classify    one or two texts -> a class or a score
tagging     words -> a tag for each
generating  what the kinds that write text share
completion  a prompt -> the text that follows it, by a causal language model
seq2seq     a text -> another, by an encoder and a decoder
"""

from selectune.tasks.kinds.classify import Classification, Regression
from selectune.tasks.kinds.completion import Completion, CompletionLoss
from selectune.tasks.kinds.generating import each_reference
from selectune.tasks.kinds.seq2seq import Seq2Seq
from selectune.tasks.kinds.tagging import Tagging

__all__ = ["Classification", "Completion", "CompletionLoss", "Regression", "Seq2Seq", "Tagging", "each_reference"]
