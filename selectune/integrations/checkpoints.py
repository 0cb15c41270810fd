"""Checkpoints of transformers' Trainer that are whole: which one a run goes on from."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

from selectune.errors import CheckpointError
from selectune.files import checkpoints, verify

log = logging.getLogger("selectune")


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint in a Trainer's output folder that is whole, each file as its manifest says; None without.

    The log says which were passed over, and why. Reads every file of the one it gives. Raises CheckpointError if there
    are checkpoints and none of them is whole.

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


def guard(trainer: Any) -> None:
    """From here on `trainer.train(resume_from_checkpoint=...)` takes whole checkpoints only.

    True means the newest that is whole, where the Trainer would take the one with the largest number; a folder that is
    not whole is a CheckpointError before anything is read from it.
    """
    train = trainer.train
    if hasattr(train, "guarded_by_selectune"):
        return

    @functools.wraps(train)
    def guarded(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            # without any the Trainer has a sentence of its own
            resume_from_checkpoint = newest_checkpoint(trainer.args.output_dir) or True
        elif isinstance(resume_from_checkpoint, str | os.PathLike) and Path(resume_from_checkpoint).is_dir():
            verify(resume_from_checkpoint)
        return train(resume_from_checkpoint, *args, **kwargs)

    guarded.guarded_by_selectune = True  # type: ignore[attr-defined]
    trainer.train = guarded
