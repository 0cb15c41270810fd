"""Whole checkpoints of transformers' Trainer, and the newest of them, from which a run resumes."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selectune.errors import CheckpointError
from selectune.files import checkpoints, verify

log = logging.getLogger("selectune")


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint in a Trainer's output folder, or None if there are no checkpoints.

    A checkpoint is whole if its files are those of its manifest; every file is read. The log names those that were
    passed over, with the reason. Raises CheckpointError if there are checkpoints and none of them is whole.

    >>> newest_checkpoint("no-such-folder")
    """
    output, broken = Path(output_dir), []
    for folder in checkpoints(output):
        try:
            verify(folder)
        except CheckpointError as error:
            broken.append(str(error))
            continue
        for problem in broken:
            log.warning("Passed over: %s", problem)
        return str(folder)
    if broken:
        raise CheckpointError(
            f"No checkpoint in {output} is whole, so there is nothing to go on from: {' '.join(broken)} One that was "
            "made without SelectuneCallback has no manifest either."
        )
    return None


def guard(trainer: Any, before: Callable[[Path], None]) -> None:
    """Makes `trainer.train(resume_from_checkpoint=...)` take only whole checkpoints.

    True means the newest whole one, where the Trainer alone would take the one with the largest number. A folder that
    is not whole raises CheckpointError before the Trainer reads it. `before` is called with a folder that is whole.
    """
    train = trainer.train
    if hasattr(train, "guarded_by_selectune"):
        return

    @functools.wraps(train)
    def guarded(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            # without any, the Trainer raises its own error
            resume_from_checkpoint = newest_checkpoint(trainer.args.output_dir) or True
        elif isinstance(resume_from_checkpoint, str | os.PathLike) and Path(resume_from_checkpoint).is_dir():
            verify(resume_from_checkpoint)
        if isinstance(resume_from_checkpoint, str | os.PathLike) and Path(resume_from_checkpoint).is_dir():
            before(Path(resume_from_checkpoint))
        return train(resume_from_checkpoint, *args, **kwargs)

    guarded.guarded_by_selectune = True  # type: ignore[attr-defined]
    trainer.train = guarded
