"""What is analysed: a delta or a run's folder, with its record and the deltas on its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from selectune.delta import DELTA_FILE, Delta, load
from selectune.errors import StudyError
from selectune.files import checkpoints, read_json
from selectune.models.load import place_of
from selectune.models.restore import Source, load_base
from selectune.runs.folder import RUN_FILE

MAX_RUN = 1 << 26


@dataclass(frozen=True, eq=False)
class Subject:
    """One run, or a delta by itself.

    `record`: its run.json, empty if there is none. `snapshots`: (steps taken, folder) of the deltas on its way.
    """

    name: str
    path: Path
    delta: Delta
    record: Mapping[str, Any] = field(default_factory=dict)
    snapshots: Sequence[tuple[int, Path]] = ()

    def base(self, source: Source | None = None) -> nn.Module:
        """The base model without the delta; by default the one that the delta records. Raises ModelError."""
        found = source or Source(place_of(self.delta, self.path))
        return load_base(found, self.delta, None, tokenizer=False).model


def read_subject(path: str | Path, name: str | None = None) -> Subject:
    """Reads a delta's file, or a folder that holds one. Raises DeltaError, and StudyError for a damaged run.json."""
    path = Path(path)
    delta = load(path)
    name = name or (path.name if path.is_dir() else path.stem)
    folder = path if path.is_dir() else path.parent
    if not (folder / RUN_FILE).is_file() or (path.is_file() and path.name != DELTA_FILE):
        return Subject(name, path, delta)
    record = read_json(folder / RUN_FILE, limit=MAX_RUN, error=StudyError)
    try:
        reached = [(int(row["step"]), folder / f"budget-{row['budget']:d}") for row in record.get("checkpoints", ())]
        points_of(record)
    except (AttributeError, KeyError, TypeError, ValueError) as why:
        raise StudyError(f"{folder / RUN_FILE} is not the record of a run: {type(why).__name__}: {why}.") from why
    reached += [(int(found.name.rpartition("-")[2]), found) for found in checkpoints(folder)]
    there = {step: found for step, found in reached if (found / DELTA_FILE).is_file()}
    return Subject(name, path, delta, record, sorted(there.items()))


def read_subjects(paths: Sequence[str | Path]) -> list[Subject]:
    """Reads several, with names that differ: as much of the end of each path as it takes."""
    whole = [Path(path).absolute() for path in paths]
    if len(set(whole)) < len(whole):
        raise StudyError("A run or delta is named twice; its overlap with itself says nothing.")
    ends = [path.parent if path.name == DELTA_FILE else path for path in whole]
    for count in range(1, max(len(end.parts) for end in ends) + 1):
        names = ["-".join(end.with_suffix("").parts[-count:]).strip("/") for end in ends]
        if len(set(names)) == len(names):
            break
    return [read_subject(path, name) for path, name in zip(paths, names, strict=True)]


def points_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metric against the scalars selected, from the record of one run: step, selected and value, in this order.

    They are the evaluations on the way and that of the saved delta.
    """
    rows = [
        {"step": int(row["step"]), "selected": int(row["selected"]), "value": float(row["metric"])}
        for row in record.get("history", ())
        if "metric" in row
    ]
    if "value" in record:
        last = {"step": int(record["steps"]), "selected": int(record["selected"]), "value": float(record["value"])}
        rows = [row for row in rows if row["step"] != last["step"]] + [last]
    return sorted(rows, key=lambda row: row["step"])
