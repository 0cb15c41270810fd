"""The task of a delta, published or of rows of the user's own, on the rows of its run or on others."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from selectune import plugins, tasks
from selectune.delta import DELTA_FILE, Delta, load
from selectune.errors import ConfigError, TaskError
from selectune.files import read_json
from selectune.models.bases import class_names
from selectune.models.restore import Source, cloze_of, in_form, task_of
from selectune.tasks import OWN, OwnRows, Task

RUN = "run.json"
MAX_RUN = 1 << 26
_SETTINGS = (
    "revision", "task", "pattern", "shots", "method", "on", "budget", "lr", "optimizer", "epochs", "max_steps",
    "batch_size", "accumulation", "max_length", "seed", "warmup", "schedule", "weight_decay", "max_grad_norm",
    "hold_out", "eval_size", "train_size", "train_size_seed", "dtype", "quantise",
)  # fmt: skip
_LISTS = ("words", "include", "exclude", "train_fully")
_FLAGS = ("group_by_length", "trust_remote_code")


def task_on(
    name: str | None, path: str | Path | None, rows: OwnRows, pattern: str | None = None, words: tuple[str, ...] = ()
) -> Task:
    """The task to measure: of this name, or of these rows, or else the one that a delta was trained on.

    `pattern`, `words`: as a cloze; a delta that was trained on one has its own.

    `path`: the delta; of its own rows it knows columns, kind and labels, and the run.json beside it says where they
    are. What `rows` leaves out is the delta's. Raises TaskError for recorded rows that are gone or are not the same any
    more, and ConfigError if nothing says what to measure, or two things do.
    """
    if path is None and pattern is not None:
        return tasks.as_cloze(task_on(name, None, rows), pattern, words)
    if pattern is not None or words:
        raise ConfigError("A pattern and its words are for a base; a delta records those that it was trained with.")
    if name is not None:
        if rows != NONE:
            raise ConfigError(f"The task {name} has its own rows: give a task or rows of your own, not both.")
        return in_form(plugins.task(name), None if path is None else load(path))
    if path is None:
        if rows.validation is None or not rows.text:
            raise ConfigError(
                "Nothing says what to measure: give a task (--task), a delta that records one (--delta), or rows "
                "(--validation FILE, --text COLUMN and --label COLUMN)."
            )
        return rows.task()
    delta = load(path)
    told = _record(delta)
    if told is None:
        known = task_of(delta)
        if known is None or rows != NONE:
            what = "no task" if known is None else f"the task {known.name}, which has its own rows"
            raise ConfigError(
                f"The delta {path} records {what}. Say what to measure: --task, one of `selectune tasks`."
            )
        return known
    text, label, kind = _columns(rows.text, told, path), rows.label or told["label"], rows.kind or told["kind"]
    if rows.validation is not None:
        return in_form(OwnRows(None, rows.validation, text, label, kind).task(labels_of(delta)), delta)
    before = _run(path)
    if before is None:
        raise ConfigError(
            f"No {RUN} beside {path} or one folder above says which rows it was measured on. Give them: --validation "
            "FILE. A delta that was made of another one, as by `selectune delta cut`, is measured so too."
        )
    held = before.hold_out
    again = OwnRows(None if held is None else before.train, before.validation, text, label, kind, held)
    task = in_form(again.task(labels_of(delta)), delta)
    if tasks.load(task, "validation").digest != told["validation"]:
        raise TaskError(
            f"{before.validation or before.train} has other rows than when {path} was measured on it. To measure on "
            "those there are now, name the file: --validation."
        )
    return task


def known_task(
    source: Source, delta: Delta | None, path: str | None, name: str | None, kind: str | None, text: tuple[str, ...]
) -> Task:
    """The task that a model answers, without its rows: of this name, or the delta's, or of this kind.

    In the last case the classes are those in the model's config. Raises ConfigError if nothing says what it is.
    """
    if name is not None:
        return in_form(plugins.task(name), delta)
    told = None if delta is None else _record(delta)
    if delta is not None and told is not None:
        return in_form(tasks.bare_task(kind or told["kind"], labels_of(delta), _columns(text, told, path)), delta)
    known = None if delta is None else task_of(delta)
    if known is not None:
        return known
    if kind is None or not text:
        what = "The model" if delta is None else f"The delta {path}"
        raise ConfigError(
            f"{what} does not say what its task is. Name it (--task), or give a kind and the column of the text "
            f"(--kind classification --text COLUMN). Kinds: {', '.join(tasks.FORMS)}."
        )
    names = labels_of(delta) if delta is not None else class_names(source.model, source.revision)
    return tasks.bare_task(kind, names, text)


def _columns(text: tuple[str, ...], told: dict[str, Any], path: str | Path | None) -> tuple[str, ...]:
    """The columns of the texts: those that are named, which are as many as in training, or else those of training."""
    trained = tuple(told["text"])
    if text and len(text) != len(trained):
        raise ConfigError(
            f"The delta {path} was trained on {len(trained)} columns of text, {', '.join(trained)}; {', '.join(text)} "
            "has another number. --text says what these columns are called in other rows."
        )
    return text or trained


NONE = OwnRows(None, None, (), None)
"""No rows are named."""


def labels_of(delta: Delta) -> tuple[str, ...]:
    """The names of the outputs in the delta's record of its model, or of its cloze, without transformers' own."""
    if (told := cloze_of(delta)) is not None:
        return tuple(told["labels"])
    model = delta.info.get("model") or {"labels": None, "num_labels": None}
    return tuple(model["labels"] or (f"LABEL_{i}" for i in range(model["num_labels"] or 0)))


def _record(delta: Delta) -> dict[str, Any] | None:
    """What a delta of own rows records of them, checked, since anybody may have written the file."""
    method = delta.info["method"]
    told = method.get("rows")
    if method.get("task") != OWN:
        return None
    texts = told.get("text") if isinstance(told, dict) else None
    if (
        not isinstance(told, dict)
        or not isinstance(texts, list)
        or not all(isinstance(value, str) for value in (*texts, told.get("kind"), told.get("validation")))
        or not isinstance(told.get("label"), str | None)
    ):
        raise TaskError(f"The delta says that it was trained on rows of one's own, but not on which: {told!r:.80}.")
    return told


def _run(path: str | Path) -> OwnRows | None:
    """Where the rows of the run beside a delta are, or of the run one folder above, of which it is a checkpoint."""
    folder = (Path(path) if Path(path).is_dir() else Path(path).parent).resolve()
    place = folder / RUN if (folder / RUN).exists() else folder.parent / RUN
    try:
        found = read_json(place, limit=MAX_RUN, error=TaskError)
    except TaskError:
        return None
    config = found.get("config") if isinstance(found, dict) else None
    told = [config.get(name) for name in ("train", "validation")] if isinstance(config, dict) else [None, None]
    if not isinstance(config, dict) or not all(isinstance(place, str | None) for place in told) or told == [None, None]:
        return None
    held = config.get("hold_out")
    return OwnRows(told[0], told[1], (), None, None, held if isinstance(held, float) else None)


def run_of(path: str | Path) -> tuple[dict[str, float], list[str]]:
    """The metrics of the run whose delta this is, by name, and the command that makes it again; empty where unknown.

    Folders and files of this machine are left out, and so is the command of a run that needs them.
    """
    path = Path(path)
    place = path.with_name(RUN) if path.name == DELTA_FILE and path.is_file() else path / RUN
    found = read_json(place, limit=MAX_RUN, error=TaskError) if place.is_file() else None
    if not isinstance(found, dict) or not isinstance(config := found.get("config"), dict):
        return {}, []
    task, base = found.get("task"), (found.get("model") or {}).get("id")
    if config.get("eval_size") is not None:
        task = f"{task}, {found.get('examples')} rows"
    values = {found.get("metric"): found.get("value"), **(found.get("others") or {})}
    metrics = {f"{name} on {task}": float(value) for name, value in values.items() if isinstance(value, int | float)}
    if any(config.get(name) for name in ("train", "plugin", "data", "soft_labels")) or not isinstance(base, str):
        return metrics, []
    named = [(name, config[name]) for name in _SETTINGS if config.get(name) is not None]
    named += [(name, value) for name in _LISTS for value in config.get(name) or ()]
    words = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in named]
    words += [f"--{name.replace('_', '-')}" for name in _FLAGS if config.get(name)]
    return metrics, [f"selectune train --model {shlex.quote(base)} {' '.join(words)} --out RUN"]
