"""A folder that one process at a time may write into, by a lock that ends with its owner."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selectune.errors import RunFolderError
from selectune.files.durable import make_folder

LOCK = ".selectune.lock"


@contextmanager
def own(folder: str | os.PathLike[str], id: str) -> Iterator[Path]:
    """Own a folder while the block runs, and make it if it is missing; other processes are refused at once.

    The kernel releases the lock (flock) when its owner ends, even by a crash. A folder made here is durable, and is
    removed again if it stays empty. `id` names the owner in the message to other processes.

    Raises RunFolderError if another process owns the folder, or if it cannot be made or written into.
    """
    folder = Path(folder)
    made: list[Path] = []
    try:
        made = make_folder(folder)
        handle = _locked(folder, id)
    except RunFolderError:
        raise
    except (NotADirectoryError, FileExistsError) as error:
        raise RunFolderError(
            f"{folder} cannot be made: {error.filename} is a file, or a link that leads nowhere. Give another folder."
        ) from error
    except ValueError as error:
        raise RunFolderError(f"{str(folder)!a} cannot be made: no path can hold such a character.") from error
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be written into: {error.strerror or error}.") from error
    try:
        yield folder
    finally:
        if handle is not None:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(handle)
        with contextlib.suppress(OSError):
            for empty in reversed(made):
                empty.rmdir()


def _locked(folder: Path, id: str) -> int | None:
    """A handle to the lock's file, which is locked; None if the file system has no locks."""
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = os.read(handle, 4096)
            os.close(handle)
            raise RunFolderError(
                f"{folder} is in use{_by(told)}. Two runs in one folder would overwrite each other's files: wait "
                "until that one has ended, or give another folder."
            ) from None
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return None
            raise
        try:
            current = os.stat(path, follow_symlinks=False).st_ino == os.fstat(handle).st_ino
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(handle)  # its last owner has removed it
    mine = {"run": id, "process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(mine).encode(), 0)
    return handle


def _by(told: bytes) -> str:
    """The owner according to the lock's file."""
    try:
        found = json.loads(told)
        return f" by another run: process {found['process']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return " by another run"
