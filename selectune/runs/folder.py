"""The folder of a run: it has one owner, is not overwritten unasked, and is cleaned after runs that died."""

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
"""The files of a finished run."""

_MARKS = (MANIFEST, "trainer_state.json", "tuner.safetensors", "optimizer.pt")  # every checkpoint has one of these


@dataclass
class RunFolder:
    """A folder that this process owns. `id` names the run in it; a resumed run keeps its first id.

    Where several processes train, the first of them owns it, and for the others it is `shared`: they write nothing.
    """

    path: Path
    id: str
    overwrite: bool = False
    shared: bool = False

    def begin(self, resumed: Path | None) -> None:
        """Makes room before the first file is written, or refuses to.

        `resumed`: the checkpoint that the run resumes from; one in this folder belongs to the same run. RunFolderError
        names anything else in the folder, unless it may be overwritten: then it is removed.
        """
        if self.shared:
            return
        ours = resumed is not None and resumed.resolve().parent == self.path.resolve()
        if not ours and not self.overwrite:
            refuse_used(self.path)
        if not ours:
            for name in RESULTS:
                (self.path / name).unlink(missing_ok=True)
            for delta in self.path.glob(f"budget-*/{RESULTS[1]}"):
                delta.unlink()
                with contextlib.suppress(OSError):  # somebody else has files in it
                    delta.parent.rmdir()
        newer = ours
        for folder in checkpoints(self.path):
            newer = newer and not folder.samefile(resumed or folder)
            if not ours or not (_is_whole(folder) if newer else (folder / MANIFEST).is_file()):
                remove_checkpoint(folder)  # a skipped one would be in the way of its successor

    def check_space(self, needed: int) -> None:
        """Raises RunFolderError if `needed` bytes do not fit."""
        free = needed if self.shared else shutil.disk_usage(self.path).free
        if free < needed:
            raise RunFolderError(
                f"{self.path} has room for {free:,} bytes; the run's delta and checkpoints may need {needed:,}. Free "
                "some, or give another folder."
            )


@contextmanager
def run_folder(out: str | os.PathLike[str], resume: bool = False, overwrite: bool = False) -> Iterator[RunFolder]:
    """Owns the folder of a run while the block runs, and removes temporary files of runs that died in it.

    Raises RunFolderError within a second, before anything is loaded, if another process owns the folder, if it cannot
    be written to, or if it holds a run and neither `resume` nor `overwrite` is given.
    """
    if _follows():
        yield RunFolder(Path(out), "", overwrite, shared=True)
        return
    id = secrets.token_hex(8)
    with own(out, id) as folder:
        if not resume and not overwrite:
            refuse_used(folder)
        gone = [name for inner in (folder, *checkpoints(folder)) for name in sweep(inner)]
        if gone:
            log.info("Removed %d temporary files in %s, of a run that died.", len(gone), folder)
        yield RunFolder(folder, id, overwrite)


def _follows() -> bool:
    """Whether torchrun or accelerate launch started this process beside a first one; torch is not loaded for that."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def refuse_used(folder: Path) -> None:
    """Raises RunFolderError if a folder holds a run, finished or not."""
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
    """Removes all but the newest `keep` checkpoints. Call it after another one was completed."""
    complete = [path for path in checkpoints(folder) if (path / MANIFEST).is_file()]
    for path in complete[keep:]:
        remove_checkpoint(path)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint, its manifest first, so that half of it is not taken for one. Other folders stay."""
    if any((folder / name).exists() for name in _MARKS) or not any(folder.iterdir()):
        with contextlib.suppress(IsADirectoryError, FileNotFoundError):
            (folder / MANIFEST).unlink()
        shutil.rmtree(folder)
