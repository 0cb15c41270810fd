"""Tasks to tune and measure a model on. A task has a metric, a chance level and a source.

common   the task, and the source of its rows
glue     the GLUE tasks, as a table
metrics/ (predictions, labels) -> a float, or floats by name
demo/    generated tasks
"""

from __future__ import annotations

from selectune.errors import UnknownTaskError, did_you_mean
from selectune.tasks.common import DATA, Example, Hub, Split, Task, load
from selectune.tasks.demo.topic import TOPIC
from selectune.tasks.glue import GLUE

TASKS: dict[str, Task] = {task.name: task for task in (*GLUE, TOPIC)}


def get(name: str) -> Task:
    """The task of that name; raises UnknownTaskError, a TaskError, that lists the known ones."""
    if name not in TASKS:
        short = {known.rpartition("/")[2]: known for known in TASKS}  # `rte` is glue/rte
        hint = f" Did you mean {short[name]}?" if name in short else did_you_mean(name.lower(), TASKS)
        raise UnknownTaskError(f"Unknown task '{name}'. Known: {', '.join(TASKS)}.{hint}")
    return TASKS[name]


__all__ = ["DATA", "TASKS", "Example", "Hub", "Split", "Task", "get", "load"]
