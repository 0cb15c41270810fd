"""What a model predicts for a file of rows, in batches of similar length; a run that was stopped can go on."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from selectune import plugins, tasks
from selectune.delta import load
from selectune.errors import ConfigError, DeltaError, TaskError
from selectune.files import write_durably
from selectune.files.reading import NotPlain, plain, short
from selectune.models.evaluate import batches
from selectune.models.recorded import known_task
from selectune.models.restore import Source, ready
from selectune.tasks.kinds import Generating
from selectune.tasks.soft import PREDICTION
from selectune.tasks.sources import NumberedRows


def predict_rows(
    source: Source,
    path: str | None,
    given: str,
    out: str,
    text: tuple[str, ...] = (),
    name: str | None = None,
    kind: str | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
    generation: Mapping[str, int] | None = None,
    follow: Callable[[int, int], None] = lambda done, batches: None,
) -> dict[str, Any]:
    """Writes `out`: for each row of the file `given`, in its order, the row and its prediction as a line of JSON.

    The task is that of the delta at `path`, or the one called `name`; a model without a delta may also be described by
    `kind` and `text`, the columns of the texts, and then its classes are those in its config. `generation`: settings of
    a kind that writes text, `max_new_tokens` and `beams`. `follow(done, batches)` is called after each batch.

    Batches are appended to `out`.partial as they are done. If that is there, of the same model, delta, rows and
    settings, only what it lacks is predicted: the result has the bits of an unbroken run.

    Raises ConfigError if `out` exists and may not be overwritten, if `out`.partial is of something else, or if nothing
    says what the task is; and TaskError, which names file and line, for a row that does not fit.
    """
    place = Path(out)
    if not out.strip() or place.is_dir() or not place.absolute().parent.is_dir():
        why = "is a folder" if place.is_dir() and out.strip() else "lies in no folder that exists"
        raise ConfigError(f"out={out!r} {why}. Give a file in an existing folder, such as answers.jsonl.")
    if place.exists() and Path(given).exists() and place.samefile(given):
        raise ConfigError(f"{out} is the file of rows itself, which would be lost. Give another file for the answers.")
    if place.exists() and not overwrite:
        raise ConfigError(f"{out} exists and would be lost. Give another file, or say that it may go (--overwrite).")
    delta = None if path is None else load(path)
    bare = known_task(source, delta, path, name, kind, text)
    if generation is not None:
        if not isinstance(bare.kind, Generating):
            raise ConfigError(
                f"A task of the kind {bare.kind.name} writes no text; `selectune predict` answers its rows."
            )
        bare = dataclasses.replace(bare, kind=dataclasses.replace(bare.kind, **generation))
    rows = tasks.read_rows(given, "validation")
    rows = NumberedRows(rows.origin, rows.unit, list(rows.numbered))
    if not rows.numbered:
        raise TaskError(f"{rows.origin} has no rows, so there is nothing to predict.")
    for number, row in rows.numbered:
        if PREDICTION in row:
            raise TaskError(f"{rows.origin}, {rows.unit} {number} has a column '{PREDICTION}' already. Rename it.")
    with plugins.blame(plugins.source_of(plugins.TASKS, bare.name)):
        task = tasks.unlabelled(bare, text, rows)
        examples = tasks.load(task, "validation").examples
    loaded, length = ready(source, delta, bare, max_length)
    if delta is None and loaded.initialised:
        raise ConfigError(
            f"{source.model} has no head for this: {', '.join(loaded.initialised[:3])} would be drawn at random. Give "
            "the delta that was trained (--delta)."
        )
    encoded = task.encode(loaded.tokenizer, examples, length)
    written = [row for _, row in rows.numbered]
    settings = [
        loaded.id, loaded.revision, str(loaded.model.dtype), None if delta is None else delta.digest, task.name,
        repr(task.kind), task.labels, task.fields, length, hashlib.sha256(_line(written)).hexdigest(),
    ]  # fmt: skip
    partial = _Partial(Path(f"{out}.partial"), hashlib.sha256(_line(settings)).hexdigest(), len(written), overwrite)
    todo = batches(encoded, task.kind.batch)
    answers = getattr(task.kind, "answers", task.kind.predict)
    with partial as found:
        loaded.model.eval()
        for done, chosen in enumerate(todo, 1):
            if not found.keys() >= set(chosen):
                with torch.no_grad(), plugins.blame(plugins.source_of(plugins.TASKS, task.name)):
                    made = answers(task, loaded.model, loaded.tokenizer, [encoded[i] for i in chosen])
                partial.add(dict(zip(chosen, made, strict=True)))
            follow(done, len(todo))
    lines = [_line({**row, PREDICTION: found[i]}) for i, row in enumerate(written)]
    write_durably(out, b"".join(lines))
    partial.path.unlink()
    return {"out": out, "rows": len(lines), "task": task.name, "kind": task.kind.name}


class _Partial:
    """The file of what is predicted already: a line that says of what, then a line for each row, in any order."""

    def __init__(self, path: Path, digest: str, rows: int, overwrite: bool) -> None:
        self.path, self.found = path, dict[int, Any]()
        head = _line({"predictions of": digest})
        try:
            self._file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        except OSError as error:
            raise DeltaError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            self._lock()
            kept = len(head)
            if not overwrite:
                kept += self._read(head, rows)
            self._file.truncate(kept)
            self._file.seek(0)
            self._file.write(head)
            self._file.seek(kept)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        """Refuses to share the file with another process; the lock ends with its owner."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self.path} is being written by another process. Wait until it has ended, or give another --out."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # file systems without locks
                raise

    def _read(self, head: bytes, rows: int) -> int:
        """Takes in what is there, and returns its bytes after the head."""
        data = self._file.read()
        if not head.startswith(data[: len(head)]):
            raise ConfigError(
                f"{self.path} is of another model, delta, file of rows or setting, so it cannot be gone on with. Give "
                "another --out, or say that it may go (--overwrite)."
            )
        kept = 0
        for at, line in enumerate(data[len(head) :].splitlines(keepends=True), 2):
            if not line.endswith(b"\n"):  # the last one was cut short
                break
            match _plain(line):
                case [int(number), value] if 0 <= number < rows:
                    self.found[number] = value
                case _:
                    raise ConfigError(
                        f"{self.path}, line {at} is no prediction of one of {rows:,} rows: the file is damaged. Give "
                        "another --out, or say that it may go (--overwrite)."
                    )
            kept += len(line)
        return kept

    def add(self, made: dict[int, Any]) -> None:
        """Writes a batch, all of it in one call, so that a kill leaves a part of it at most."""
        self._file.write(b"".join(_line([number, value]) for number, value in made.items()))
        self._file.flush()
        self.found |= made

    def __enter__(self) -> dict[int, Any]:
        return self.found

    def __exit__(self, *why: object) -> None:
        self._file.close()


def _plain(line: bytes) -> Any:
    try:
        return plain(line)
    except NotPlain:
        return None


def _line(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str).encode() + b"\n"
    except ValueError as error:
        raise TaskError(f"JSON has no NaN and no infinity, so this cannot be written: {short(value)}.") from error
