"""Tasks to tune and measure a model on. A task has rows, a kind, a metric, a chance level and a source.

task      the task as a value, and the contract of its kind
sources   rows as they lie in a file or on the hub
splits    a task's rows: from a folder, the hub or a generator; the first N of them
own       a task of files and names of columns, without code
labels    what a kind needs for that: its labels as rows have them, its metric, a constant answer
soft      the probability of each class in place of one, as an ensemble gives it
kinds/    which head, and how rows are encoded, collated and predicted
metrics/  (predictions, answers) -> one number, or several by name
tables/   the published tasks
demo/     generated tasks
"""

from __future__ import annotations

from selectune.errors import UnknownTaskError, did_you_mean
from selectune.tasks.demo.logbook import LOGBOOK, SENTENCES
from selectune.tasks.demo.topic import TOPIC
from selectune.tasks.kinds import (
    KINDS,
    Choice,
    Classification,
    Cloze,
    Completion,
    CompletionLoss,
    Language,
    Multilabel,
    Regression,
    Seq2Seq,
    Tagging,
    as_cloze,
    with_shots,
)
from selectune.tasks.labels import FORMS
from selectune.tasks.own import OWN, OwnRows, bare_task, unlabelled
from selectune.tasks.soft import read_soft, soft_labels, surest, with_soft_labels, write_soft
from selectune.tasks.sources import read_rows
from selectune.tasks.splits import DATA, Split, first_rows, load, some_rows, splits_of
from selectune.tasks.tables.commonsense import COMMONSENSE
from selectune.tasks.tables.data_to_text import DATA_TO_TEXT
from selectune.tasks.tables.glue import GLUE
from selectune.tasks.tables.ner import NER
from selectune.tasks.tables.problems import PROBLEMS
from selectune.tasks.tables.summaries import SUMMARIES
from selectune.tasks.tables.texts import TEXTS
from selectune.tasks.tables.topics import SUBJECTS
from selectune.tasks.task import ANSWER, Example, Features, Head, Hub, Task, TaskKind

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *GLUE,
        *SUBJECTS,
        *NER,
        *SUMMARIES,
        *PROBLEMS,
        *COMMONSENSE,
        *DATA_TO_TEXT,
        *TEXTS,
        TOPIC,
        LOGBOOK,
        SENTENCES,
    )
}


def get(name: str) -> Task:
    """The task of that name; raises UnknownTaskError, a TaskError, that lists the known ones."""
    if name not in TASKS:
        short = {known.rpartition("/")[2]: known for known in TASKS}  # `rte` is glue/rte
        hint = f" Did you mean {short[name]}?" if name in short else did_you_mean(name.lower(), TASKS)
        raise UnknownTaskError(f"Unknown task '{name}'. Known: {', '.join(TASKS)}.{hint}")
    return TASKS[name]


__all__ = [
    "TASKS", "get", "load", "splits_of", "first_rows", "some_rows", "DATA", "Split", "FORMS", "OWN", "OwnRows", "KINDS",
    "bare_task", "unlabelled", "read_rows", "read_soft", "write_soft", "with_soft_labels", "soft_labels", "surest",
    "Task", "TaskKind", "Head", "Hub", "Example", "Features", "ANSWER",
    "Classification", "Multilabel", "Regression", "Tagging", "Completion", "CompletionLoss", "Seq2Seq", "Choice",
    "Cloze", "Language", "as_cloze", "with_shots",
]  # fmt: skip
