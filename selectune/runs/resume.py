"""Resuming a run: the contents of its checkpoints, the choice of one, and the settings that must agree."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectune import plugins
from selectune.adapters import Adapted
from selectune.errors import CheckpointError, ConfigError
from selectune.files import Manifest, checkpoints, read_json, verify, write_durably
from selectune.models.bases import resolve
from selectune.runs.config import RunConfig
from selectune.runs.folder import RUN_FILE
from selectune.train import STATE_FILE, read_state, world

log = logging.getLogger("selectune")

ADAPTER_FILE = "module.safetensors"
"""The file in a checkpoint with the state that an adapter keeps between steps, apart from its weights."""

_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", STATE_FILE, RUN_FILE)
_FIELDS: dict[str, Any] = {
    "step": int, "settings": dict, "rows": str, "seconds": int | float, "versions": dict, "unmeasured": bool,
    "history": list,
}  # fmt: skip
MAX_RUN = 1 << 26
"""The most bytes of a run.json, whose history grows with the run."""
# No bit depends on these; `plugins` has what a plug-in's file holds, wherever it lies.
_FREE = (
    "out", "data", "train", "validation", "eval_every", "save_every", "keep", "full_checkpoints", "report_to", "retain",
    "plugin", "soft_labels", "eval_size",
)  # fmt: skip

_LATER = (
    "text", "label", "kind", "hold_out", "train_size", "train_size_seed", "checkpoint_budgets", "pattern", "words",
    "optimizer", "shots", "quantise",
)  # fmt: skip
"""Settings that older checkpoints lack; a run that does not use them has none either."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of `selectune train`. `unmeasured`: the run stopped before its step was measured."""

    folder: Path
    run: str
    step: int
    settings: Mapping[str, Any]
    rows: str
    seconds: float
    history: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]
    unmeasured: bool = False


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that decide a delta's bits, defaults filled in. The model is named, because a folder may move."""
    told = {key: value for key, value in config.as_json().items() if key not in _FREE}
    settings = {key: value for key, value in told.items() if value not in (None, [], 0) or key not in _LATER}
    settings["lr"], settings["method"] = config.learning_rate, config.canonical
    settings["model"] = resolve(config.model, config.revision).id
    if world.size() > 1:
        settings["processes"] = world.size()
    if found := plugins.used(config.recipe, config.task):
        settings["plugins"] = found
    if config.max_steps is None and config.epochs is None:
        settings["epochs"] = config.the_task.epochs
    return settings


def digest_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """A digest of encoded rows in their order, 16 hex digits."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True).encode())
    return found.hexdigest()[:16]


def write_run(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes the run.json of a checkpoint: the fields of `Checkpoint`."""
    write_durably(folder / RUN_FILE, json.dumps(record, indent=2).encode())


def load_adapter(found: Checkpoint, adapted: Adapted | None) -> None:
    """Gives an adapter the state it had kept. Raises ConfigError for a checkpoint that lacks it."""
    if adapted is None or adapted.kept is None:
        return
    if not (found.folder / ADAPTER_FILE).is_file():
        raise ConfigError(f"{found.folder} has no {ADAPTER_FILE}, which {adapted.spec.kind} needs to go on.")
    adapted.kept.load_state_dict(read_state(found.folder / ADAPTER_FILE))


def find(config: RunConfig, resume: bool | str | Path) -> Checkpoint:
    """The checkpoint that a run resumes from: this folder, or (True) the newest whole one in `out`.

    Raises ConfigError if there is none, or if it is of another run, with each setting that differs. Raises
    CheckpointError if it is incomplete or damaged. The log names those in `out` that were passed over, with the reason.
    Reads no model and no data.
    """
    if not isinstance(resume, bool):
        found = _explicit(Path(resume))
        _same_run(found, config)
        return _by_others(found)
    out, mine = Path(str(config.out)), settings_of(config)
    others: list[Checkpoint] = []
    broken: list[str] = []
    for folder in checkpoints(out):
        try:
            found = read(folder)
        except CheckpointError as error:
            broken.append(str(error))
            continue
        if _compared(found.settings) == _compared(mine):
            for problem in broken:
                log.warning("Passed over: %s", problem)
            return _by_others(found)
        others.append(found)
    if others:
        _same_run(others[0], config)
    if broken:
        raise CheckpointError(f"No checkpoint in {out} is whole, so there is nothing to go on from: {' '.join(broken)}")
    raise ConfigError(
        f"There is no checkpoint to resume in {config.out}. A run writes them with save_every=K (command line: "
        "--save-every K); without one, start anew."
    )


def _compared(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that must agree: the rows of a pass are compared over all processes, however many share them."""
    batch, processes = settings.get("batch_size"), settings.get("processes", 1)
    if type(batch) is not int or type(processes) is not int or settings.get("group_by_length"):
        return settings  # which rows are of similar length is found for batches of the size of a process's own
    others = {name: value for name, value in settings.items() if name not in ("batch_size", "processes")}
    return {**others, "rows of a pass": batch * processes}


def _by_others(found: Checkpoint) -> Checkpoint:
    """The checkpoint, with a warning if another number of processes wrote it."""
    wrote = found.settings.get("processes", 1)
    if wrote != world.size():
        log.warning(
            "%s was written by %d processes, and %d go on: each step has the same rows and selects by the same rule, "
            "but dropout draws anew, sums are rounded otherwise, and where the rows of an epoch do not divide, several "
            "processes fill its last step up with its first rows.", found.folder, wrote, world.size(),
        )  # fmt: skip
    return found


def read(folder: Path) -> Checkpoint:
    """Reads a folder as a checkpoint. Raises CheckpointError if a file is not the one in its manifest."""
    manifest = verify(folder)
    missing = [name for name in _FILES if name not in manifest.files]
    if not any(name.startswith("rng_state") for name in manifest.files):
        missing.append("rng_state.pth")  # or one for each process
    if missing:
        raise CheckpointError(f"{folder} is no checkpoint of selectune train: it was made without {missing[0]}.")
    told = read_json(folder / RUN_FILE, limit=MAX_RUN, error=CheckpointError)
    wrong = _wrong(told, manifest)
    if wrong:
        raise CheckpointError(f"{folder / RUN_FILE} is not that of a checkpoint: {wrong}.")
    return Checkpoint(folder=folder, run=str(manifest.about["run"]), **told)


def _wrong(told: Any, manifest: Manifest) -> str:
    """The fault of a checkpoint's run.json, or an empty text."""
    if not isinstance(told, dict) or told.keys() != _FIELDS.keys():
        return f"it must have the keys {', '.join(_FIELDS)}"
    for name, kind in _FIELDS.items():
        if not isinstance(told[name], kind) or (isinstance(told[name], bool) and kind is not bool):
            return f"its {name} is {told[name]!r:.60}"
    if not all(isinstance(record, dict) and type(record.get("step")) is int for record in told["history"]):
        return "its history has a record without a step"
    if manifest.about.get("step") != told["step"] or not isinstance(manifest.about.get("run"), str):
        return f"its step {told['step']} is not the manifest's"
    return ""


def _explicit(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise ConfigError(f"The checkpoint {folder} {what}; expected a folder such as OUT/checkpoint-100.")
    inside = [path.name for path in checkpoints(folder)]
    if inside:
        raise ConfigError(f"{folder} is the folder of a run. Its checkpoints, newest first: {', '.join(inside[:5])}.")
    try:
        return read(folder)
    except CheckpointError as error:
        others = []
        for other in checkpoints(folder.parent):
            with contextlib.suppress(CheckpointError):
                if other != folder:
                    others.append(read(other).folder.name)
        whole = f" Beside it these are whole: {', '.join(others)}." if others else ""
        raise CheckpointError(f"{error}{whole}") from error


def _same_run(found: Checkpoint, config: RunConfig) -> None:
    mine = settings_of(config)
    if _compared(found.settings) != _compared(mine):
        names = [n for n in {**found.settings, **mine} if found.settings.get(n) != mine.get(n)]
        told = ", ".join(f"{n} ({found.settings.get(n)!r} there, {mine.get(n)!r} now)" for n in names)
        raise ConfigError(
            f"The checkpoint {found.folder} is of a run with other settings: {told}. Resume with the settings that "
            "made it, or start anew without --resume."
        )
