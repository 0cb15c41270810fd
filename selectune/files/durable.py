"""How files are written and read here: written durably, and read once, into memory of our own."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from selectune.errors import DeltaError, DeltaFormatError

MAX_FILE = 1 << 36
"""Largest file that is read: 64 GiB."""

_TEMP = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)


def write_durably(path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> Path:
    """Write `data` so that `path` holds all of it or its old content, also after a crash.

    The steps: a temp file in the same directory, write, fsync, rename, fsync of the directory. A symbolic link at
    `path` is replaced, not followed. The mode is that of the replaced file, or 0666 without the umask's bits. If only
    the last step fails, the new file is in place and complete, but a power loss may undo it.

    Raises DeltaError that names the path; the temp file is gone then. Returns the path.
    """
    path = Path(path)
    temp = f".{path.name}.{secrets.token_hex(8)}.tmp"
    renamed = False
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC)
        try:
            _write_in(folder, path.name, temp, memoryview(data).cast("B"))
            renamed = True
            _flush(folder)
        finally:
            os.close(folder)
    except OSError as error:
        what = f"{path} ({len(data)} bytes): {error.strerror or error}"
        if renamed:
            raise DeltaError(f"wrote {what}; but its directory could not be flushed") from error
        raise DeltaError(f"cannot write {what}; what was there before is unchanged") from error
    except ValueError as error:
        raise DeltaError(f"cannot write {str(path)!a}: no path can hold such a character") from error
    return path


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and the missing ones above it, durably; returns those that it made, the topmost first."""
    if folder.is_dir():
        return []
    made = [] if folder.parent.is_dir() else make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush_folder(folder.parent)
    return [*made, folder]


def flush_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable, if we may open it and its file system supports that."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return  # the folder is not ours, so we have made nothing in it
    try:
        _flush(handle)
    finally:
        os.close(handle)


def sweep(folder: str | os.PathLike[str]) -> list[str]:
    """Remove the temp files that dead writers left in this folder, not in those below it; returns their names.

    Only the owner of the folder may call it: a living writer would lose its file.
    """
    gone = list(filter(_TEMP.fullmatch, os.listdir(folder)))
    for name in gone:
        os.unlink(os.path.join(folder, name))
    return gone


def _write_in(folder: int, name: str, temp: str, data: memoryview) -> None:
    mode = _mode_of(folder, name)
    # the kernel applies the umask to 0666 here; reading the umask ourselves would change it for other threads
    handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _CLOEXEC, 0o666, dir_fd=folder)
    try:
        try:
            while len(data):
                data = data[os.write(handle, data) :]
            if mode is not None:
                os.fchmod(handle, mode)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temp, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        try:
            os.unlink(temp, dir_fd=folder)
        except FileNotFoundError:
            pass  # renamed before the interruption
        raise


def _flush(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        # some file systems cannot flush a directory, and a read-only one above ours has nothing to flush
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise


def _mode_of(folder: int, name: str) -> int | None:
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None
    return stat.S_IMODE(found) if stat.S_ISREG(found) else None


def read_owned(
    path: str | os.PathLike[str],
    limit: int = MAX_FILE,
    head: tuple[int, Callable[[bytearray, int], None]] | None = None,
) -> bytearray:
    """Read a regular file once, whole, into memory that nobody else can change.

    `head` = (n, check) calls `check(first n bytes, file size)` before anything else is read, so that a file
    can be refused by its beginning. Symbolic links are followed; FIFOs, devices, sockets and directories are
    refused.

    Raises DeltaError if the file cannot be read, DeltaFormatError if it is no regular file, too large, or changes its
    size during the read.
    """
    handle = open_regular(path)
    try:
        found = os.fstat(handle)
        if found.st_size > limit:
            raise DeltaFormatError(f"{path} is too large: {found.st_size} bytes; at most {limit} are read")
        if head is not None:
            head[1](_read_exactly(handle, min(head[0], found.st_size), path), found.st_size)
            os.lseek(handle, 0, os.SEEK_SET)
        data = _read_exactly(handle, found.st_size, path)
        if os.read(handle, 1):
            raise DeltaFormatError(f"{path} grew while it was read; expected {found.st_size} bytes")
        return data
    except OSError as error:
        raise DeltaError(f"cannot read {path}: {error.strerror or error}") from error
    finally:
        os.close(handle)


def open_regular(path: str | os.PathLike[str]) -> int:
    """A handle for reading a regular file; symbolic links are followed. Raises as `read_owned` does."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for a writer for ever
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise DeltaFormatError(f"{path} is not a regular file") from error
        raise DeltaError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # NUL, or a character that the file system has none for
        raise DeltaError(f"cannot read {os.fspath(path)!a}: no path can hold such a character") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DeltaFormatError(f"{path} is not a regular file; expected a file of its own, no folder, pipe or device")
    return handle


def _read_exactly(handle: int, size: int, path: str | os.PathLike[str]) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        got = os.readv(handle, [view[done:]])
        if not got:
            raise DeltaFormatError(f"{path} shrank while it was read: {done} bytes; expected {size}")
        done += got
    return data
