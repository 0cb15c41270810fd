"""Rows as they lie in a file (JSON lines, csv, tsv, parquet) or on the hub, numbered, and nothing done to them yet."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from selectune.errors import TaskError, did_you_mean
from selectune.files import read_csv, read_lines
from selectune.tasks.task import Hub

ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")
"""The endings of files of rows; all but parquet may have .gz after it."""

_HUB = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


class NumberedRows(NamedTuple):
    """The origin of some rows, what their numbers count ("line" or "row"), and the rows with their numbers."""

    origin: str
    unit: str
    numbered: Iterable[tuple[int, Any]]


def all_texts(place: str) -> bool:
    """True if every cell of the file is a text, as in csv and tsv, so that a number is one by its looks."""
    return place.removesuffix(".gz").endswith((".csv", ".tsv"))


def read_rows(place: str, split: str) -> NumberedRows:
    """The rows of a file by its ending, or of a split of a hub's data set, `org/name[:config][@revision]`.

    Raises TaskError for a place that is neither, and as the rows are read for each fault, with file and line.
    """
    path = Path(place).expanduser()
    ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if path.is_dir():
        there = ", ".join(sorted(each.name for each in path.iterdir())[:5]) or "nothing"
        raise TaskError(f"{place} is a folder, which holds {there}. Name one file of rows: {', '.join(ENDINGS)}.")
    if path.exists():
        if ending == ".parquet" and path.suffix != ".gz":
            return NumberedRows(str(path), "row", _parquet(path))
        if ending in (".csv", ".tsv"):
            return NumberedRows(
                str(path), "line", read_csv(path, error=TaskError, delimiter="\t" if ending == ".tsv" else ",")
            )
        if ending == ".jsonl":
            return NumberedRows(str(path), "line", read_lines(path, error=TaskError))
        raise TaskError(f"{place} ends in none of {', '.join(ENDINGS)}, so nothing says how its rows are written.")
    found = _HUB.fullmatch(place)
    if found is None or ending in (*ENDINGS, ".json", ".gz"):
        near = [] if not path.parent.is_dir() else [each.name for each in path.parent.iterdir()]
        raise TaskError(f"The file {place} does not exist.{did_you_mean(path.name, near)}")
    try:
        return from_hub(Hub(found["path"], found["config"], found["revision"]), split)
    except TaskError as error:
        raise TaskError(f"{place} is no file here, and as a data set of the hub it cannot be had: {error}") from error


def from_hub(hub: Hub, split: str) -> NumberedRows:
    """The rows of a split on the hub, through `datasets`. Raises TaskError if that is not installed or cannot do it."""
    origin = f"hub {hub.path}{f'/{hub.config}' if hub.config else ''}@{hub.revision or 'main'}"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TaskError(
            "the package `datasets` that fetches it from the hub is not installed (pip install 'selectune[hf]')."
        ) from error
    try:
        rows = load_dataset(hub.path, hub.config, split=split, revision=hub.revision)
    except (OSError, ValueError, RuntimeError) as error:  # the hub is offline or unreachable, or lacks the split
        why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise TaskError(f"{origin} cannot be reached ({why}).") from error
    return NumberedRows(origin, "row", enumerate(rows, 1))


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise TaskError(
            f"{path}: parquet is read by the package pyarrow, which is not installed (pip install 'selectune[hf]')."
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(os.fspath(path)) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())[:200]
        raise TaskError(f"{path}, after row {number}: this is no parquet that can be read ({why}).") from error
