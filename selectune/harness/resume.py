"""Going on with a run: what is kept in its checkpoints, which one is taken, and what must be as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectune import tasks
from selectune.adapters import Adapted
from selectune.errors import ConfigError
from selectune.files import write_durably
from selectune.harness.config import RunConfig
from selectune.harness.models import resolve
from selectune.train import STATE_FILE, read_state

RUN_FILE = "run.json"
MODULE_FILE = "module.safetensors"
"""What a module keeps between steps beside its weights, in a checkpoint."""

NEWEST = True
"""In place of a checkpoint: the newest in `out`."""

_PREFIX = "checkpoint-"
_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE_FILE, RUN_FILE)
_FREE = ("out", "data", "eval_every", "save_every", "report_to")  # no bit depends on these


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of `selectune train`."""

    folder: Path
    step: int
    settings: Mapping[str, Any]
    rows: str
    seconds: float
    history: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What a delta's bits depend on, with defaults filled in; the model by its name, since a folder may be moved."""
    settings = {key: value for key, value in config.as_json().items() if key not in _FREE}
    settings["lr"] = config.learning_rate
    settings["model"] = resolve(config.model, config.revision).id
    if config.max_steps is None and config.epochs is None:
        settings["epochs"] = tasks.get(config.task).epochs
    return settings


def digest_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """16 hex digits over encoded rows, in their order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True).encode())
    return found.hexdigest()[:16]


def write_run(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes a checkpoint's run.json: what `Checkpoint` holds."""
    write_durably(folder / RUN_FILE, json.dumps(record, indent=2).encode())


def load_module(found: Checkpoint, adapted: Adapted | None) -> None:
    """Gives a module what it had kept; raises ConfigError for a checkpoint that lacks it."""
    if adapted is None or adapted.ranks is None:
        return
    if not (found.folder / MODULE_FILE).is_file():
        raise ConfigError(f"{found.folder} has no {MODULE_FILE}, which {adapted.spec.kind} needs to go on.")
    adapted.ranks.load_state_dict(read_state(found.folder / MODULE_FILE))


def newest(config: RunConfig) -> Checkpoint | None:
    """The newest complete checkpoint of this very run in its `out`, if there is one."""
    made = settings_of(config)
    return next((found for found in _complete(Path(str(config.out))) if found.settings == made), None)


def find(config: RunConfig, resume: bool | str | Path) -> Checkpoint:
    """The checkpoint that a run is to go on from: a folder, or the newest in `out` (True).

    Raises ConfigError for a folder that is missing or no complete checkpoint, and for one of another run, naming each
    setting that differs. Reads no model and no data.
    """
    if not isinstance(resume, bool):
        found = read(Path(resume))
        _same_run(found, config)
        return found
    here = newest(config)
    if here is not None:
        return here
    others = _complete(Path(str(config.out)))
    if others:
        _same_run(others[0], config)
    raise ConfigError(
        f"There is no checkpoint to resume in {config.out}. A run writes them with save_every=K (command line: "
        "--save-every K); without one, start anew."
    )


def read(folder: Path) -> Checkpoint:
    """A folder as a checkpoint; raises ConfigError that says what is missing."""
    if not folder.is_dir():
        raise ConfigError(f"The checkpoint {folder} does not exist; expected a folder such as OUT/{_PREFIX}100.")
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} is no complete checkpoint of selectune train: {', '.join(missing)} missing. The process may "
            "have stopped while it was written; take an earlier one."
        )
    try:
        told = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return Checkpoint(
            folder=folder,
            step=int(told["step"]),
            settings=dict(told["settings"]),
            rows=str(told["rows"]),
            seconds=float(told["seconds"]),
            history=[dict(record) for record in told["history"]],
            versions=dict(told["versions"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / RUN_FILE} is not that of a checkpoint of selectune train: {error!r}.") from error


def _complete(out: Path) -> list[Checkpoint]:
    """All complete checkpoints in a folder, newest first."""
    found = []
    for folder in out.glob(f"{_PREFIX}*") if out.is_dir() else ():
        try:
            found.append(read(folder))
        except ConfigError:
            continue
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def _same_run(found: Checkpoint, config: RunConfig) -> None:
    mine = settings_of(config)
    names = [n for n in {**found.settings, **mine} if found.settings.get(n) != mine.get(n)]
    if names:
        told = ", ".join(f"{n} ({found.settings.get(n)!r} there, {mine.get(n)!r} now)" for n in names)
        raise ConfigError(
            f"The checkpoint {found.folder} is of a run with other settings: {told}. Resume with the settings that "
            "made it, or start anew without --resume."
        )
