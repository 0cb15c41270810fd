"""A folder that appears with all of its files, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selectune.errors import ConfigError, DeltaError
from selectune.files.durable import flush_folder, make_folder


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder beside `folder` that gets its name when the block ends; if the block raises, nothing is left.

    All files are flushed before the new name appears, so a folder of this name is complete, also after a crash.
    Raises ConfigError if `folder` is there already and not an empty folder, DeltaError if it cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is no folder; give a folder that does not exist yet, or an empty one.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty, and nothing is overwritten: give another folder, or remove it.")
    temp = folder.parent / f".{folder.name}.{secrets.token_hex(8)}.tmp"
    try:
        make_folder(folder.parent)
        temp.mkdir()
        yield temp
        for path in (*temp.rglob("*"), temp):
            _flush(path)
        os.rename(temp, folder)
        flush_folder(folder.parent)
    except OSError as error:
        raise DeltaError(f"cannot write {folder}: {error.strerror or error}; nothing is left of it") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _flush(path: Path) -> None:
    if path.is_dir():
        flush_folder(path)
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())
