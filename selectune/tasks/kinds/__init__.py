"""The kinds of tasks: which head a model gets, and how rows are encoded, collated and predicted.

classify      one or two texts -> a class, a score, or any number of labels
cloze         one or two texts -> a class, told by a word in a blank
tagging       words -> a tag for each
language      a text, token after token
choice        a prompt and several texts -> the likeliest of them
token_losses  the losses of tokens, with few logits at once
generating    what the kinds that write text share
completion    a prompt -> the text that follows it, by a causal language model
seq2seq       a text -> another, by an encoder and a decoder
"""

from selectune.tasks.kinds.choice import Choice
from selectune.tasks.kinds.classify import Classification, Multilabel, Regression
from selectune.tasks.kinds.cloze import Cloze, as_cloze, with_shots
from selectune.tasks.kinds.completion import Completion, CompletionLoss
from selectune.tasks.kinds.generating import Generating, each_reference
from selectune.tasks.kinds.language import Language
from selectune.tasks.kinds.seq2seq import Seq2Seq
from selectune.tasks.kinds.tagging import Tagging
from selectune.tasks.task import TaskKind

_KINDS: tuple[TaskKind, ...] = (
    Classification(), Regression(), Multilabel(), Tagging(), Completion(), CompletionLoss(), Seq2Seq(), Choice(),
    Language(),
)  # fmt: skip
KINDS: dict[str, TaskKind] = {kind.name: kind for kind in _KINDS}
"""The kinds by name, with their default settings."""

__all__ = [
    "KINDS", "Choice", "Classification", "Cloze", "Completion", "CompletionLoss", "Generating", "Language",
    "Multilabel", "Regression", "Seq2Seq", "Tagging", "as_cloze", "each_reference", "with_shots",
]  # fmt: skip
