"""The folder of a run: one owner, nothing overwritten without a word, nothing left by those that died."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from selectune.errors import CheckpointError, RunFolderError
from selectune.files import MANIFEST, checkpoints, own, sweep, verify

log = logging.getLogger("selectune")

RUN_FILE = "run.json"
RESULTS = (RUN_FILE, "delta.safetensors")
"""What a finished run leaves in its folder."""

_MARKS = (MANIFEST, "trainer_state.json", "tuner.safetensors", "optimizer.pt")  # one of them is in every checkpoint


@dataclass
class RunFolder:
    """A folder that this process owns. `id`: of the run in it; a resumed run keeps the id it began with."""

    path: Path
    id: str
    overwrite: bool = False

    def begin(self, resumed: Path | None) -> None:
        """Before the first file is written: makes room, or refuses to.

        `resumed`: the checkpoint that the run goes on from; one in this folder is of the same run. Whatever else is
        there is kept, and RunFolderError says what it is, unless it may be overwritten: then it is removed.
        """
        ours = resumed is not None and resumed.resolve().parent == self.path.resolve()
        if not ours and not self.overwrite:
            refuse_used(self.path)
        if not ours:
            for name in RESULTS:
                (self.path / name).unlink(missing_ok=True)
        newer = ours
        for folder in checkpoints(self.path):
            newer = newer and not folder.samefile(resumed or folder)
            if not ours or not (_is_whole(folder) if newer else (folder / MANIFEST).is_file()):
                remove_checkpoint(folder)  # one that was passed over would be in the way of its successor

    def check_space(self, needed: int) -> None:
        """Raises RunFolderError where `needed` bytes do not fit."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise RunFolderError(
                f"{self.path} has room for {free:,} bytes; the run's delta and checkpoints may need {needed:,}. Free "
                "some, or give another folder."
            )


@contextmanager
def run_folder(out: str | os.PathLike[str], resume: bool = False, overwrite: bool = False) -> Iterator[RunFolder]:
    """Owns the folder of a run while the block runs; temporary files of runs that died in it are removed.

    Raises RunFolderError within a second and before anything is loaded: where another process owns the folder, where it
    cannot be written into, or, without `resume` and `overwrite`, where a run is in it.
    """
    id = secrets.token_hex(8)
    with own(out, id) as folder:
        if not resume and not overwrite:
            refuse_used(folder)
        gone = [name for inner in (folder, *checkpoints(folder)) for name in sweep(inner)]
        if gone:
            log.info("Removed %d temporary files in %s, of a run that died.", len(gone), folder)
        yield RunFolder(folder, id, overwrite)


def refuse_used(folder: Path) -> None:
    """Raises RunFolderError if a run is in a folder, finished or not."""
    there = [name for name in RESULTS if (folder / name).exists()]
    saved = checkpoints(folder)
    if there:
        raise RunFolderError(
            f"{folder} holds {' and '.join(there)} of an earlier run, which would be lost. Give another folder, or say "
            "that it may go (overwrite=True, command line: --overwrite)."
        )
    if saved:
        raise RunFolderError(
            f"{folder} holds checkpoints of a run that did not end, {saved[0].name} the newest. Go on from it "
            "(resume=True, command line: --resume), give another folder, or say that they may go (overwrite=True, "
            "command line: --overwrite)."
        )


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


def rotate(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints; for just after another was completed."""
    complete = [path for path in checkpoints(folder) if (path / MANIFEST).is_file()]
    for path in complete[keep:]:
        remove_checkpoint(path)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint, its manifest first, so that half of one is none. What looks like no checkpoint stays."""
    if any((folder / name).exists() for name in _MARKS) or not any(folder.iterdir()):
        with contextlib.suppress(IsADirectoryError, FileNotFoundError):
            (folder / MANIFEST).unlink()
        shutil.rmtree(folder)
