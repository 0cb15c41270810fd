"""A disk that may lose power: what was written, flushed and renamed is recorded, and all that could be left is made.

After a crash at any moment (a prefix of what was recorded), POSIX allows:

    content of a file      what was there at its last fsync, and any of the later writes, whole, half, or as zeros
    names in a folder      those of its last fsync, and any of the later changes, in any combination; a rename is one
    fsync of a file        makes its content durable, and not its name
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Change = tuple[str, Any]  # a name in a folder, and what it then stands for; None: nothing


@dataclass
class Disk:
    """What is durable, and what is not yet. Numbers stand for files, and paths of folders for folders."""

    durable: dict[int, bytes] = field(default_factory=dict)
    writes: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)  # of each file since its last fsync
    names: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each folder, durable
    changes: dict[str, list[list[Change]]] = field(default_factory=dict)  # since the folder's last fsync

    def do(self, kind: str, *what: Any) -> None:
        if kind == "folder":
            (path,) = what
            self.names.setdefault(path, {})
            self.changes.setdefault(path, [])
        elif kind == "names":
            folder, changes = what
            self.changes[folder].append(changes)
        elif kind == "write":
            number, at, data = what
            self.writes.setdefault(number, []).append((at, data))
            self.durable.setdefault(number, b"")
        elif kind == "flush":
            (number,) = what
            for at, data in self.writes.pop(number, []):
                self.durable[number] = put(self.durable.get(number, b""), at, data)
        elif kind == "flush names":
            (folder,) = what
            for changes in self.changes[folder]:
                self.names[folder].update(changes)
            self.changes[folder] = []

    def contents(self, number: int) -> set[bytes]:
        """All that a file could hold after a crash now."""
        found = {self.durable.get(number, b"")}
        for at, data in self.writes.get(number, []):
            some = (data, data[: len(data) // 2], bytes(len(data)))
            found |= {put(before, at, part) for before in found for part in some}
        return found

    def folders(self, path: str) -> list[dict[str, Any]]:
        """All names that a folder could have after a crash now."""
        found = []
        for kept in itertools.product((False, True), repeat=len(self.changes[path])):
            names = dict(self.names[path])
            for changes, done in zip(self.changes[path], kept, strict=True):
                names.update(changes if done else [])
            names = {name: what for name, what in names.items() if what is not None}
            if names not in found:
                found.append(names)
        return found

    def trees(self, path: str) -> Iterator[frozenset[tuple[str, bytes]]]:
        """All trees of (path, content) below a folder that a crash now could leave; a folder's content is b"/"."""
        for names in self.folders(path):
            parts: list[list[frozenset[tuple[str, bytes]]]] = []
            for name, what in names.items():
                here = f"{path}/{name}"
                if isinstance(what, str):
                    parts.append([tree | {(here, b"/")} for tree in self.trees(what)])
                else:
                    parts.append([frozenset({(here, data)}) for data in self.contents(what)])
            for combined in itertools.product(*parts):
                yield frozenset().union(*combined)


def put(before: bytes, at: int, data: bytes) -> bytes:
    """A file's bytes with others written at a place."""
    return before[:at].ljust(at, b"\0") + data + before[at + len(data) :]


class Recorder:
    """Records what happens below a folder through `os`, and through `create` for files that others write."""

    def __init__(self, root: Path, monkeypatch: Any, piece: int = 1 << 20) -> None:
        self.root, self.log, self.piece = root, [("folder", str(root))], piece
        self._open: dict[int, list[int]] = {}  # handle: number of the file, place of the next write
        self._files: dict[Path, int] = {}  # numbers are never used again, as those of the file system are
        for name in ("open", "write", "fsync", "replace", "unlink", "close", "mkdir"):
            monkeypatch.setattr(os, name, getattr(self, f"_{name}_of")(getattr(os, name)))

    def create(self, name: str, data: bytes) -> None:
        """A file of somebody who flushes nothing."""
        handle = os.open(self.root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        while data:
            data = data[os.write(handle, data) :]
        os.close(handle)

    def add(self, kind: str, *what: Any) -> None:
        self.log.append((kind, *what))

    def _names(self, *changes: tuple[Path, Any]) -> None:
        self.add("names", str(changes[0][0].parent), [(path.name, what) for path, what in changes])

    def _below(self, path: Any, folder: int | None = None) -> Path | None:
        whole = Path(os.path.abspath(path if folder is None else Path(os.readlink(f"/proc/self/fd/{folder}"), path)))
        return whole if whole.is_relative_to(self.root) else None

    def _open_of(self, real):
        def call(path, flags, *more, dir_fd=None):
            here = self._below(path, dir_fd)
            new = here is not None and not here.exists()
            handle = real(path, flags, *more, dir_fd=dir_fd)
            if here is not None and flags & os.O_CREAT:
                if new:
                    self._files[here] = len(self.log)
                    self._names((here, self._files[here]))
                number = self._files[here]
                self._open[handle] = [number, 0]
                self.add("write", number, 0, b"")
            return handle

        return call

    def _write_of(self, real):
        def call(handle, data):
            done = real(handle, bytes(data[: self.piece]))
            if handle in self._open:
                number, at = self._open[handle]
                self.add("write", number, at, bytes(data[:done]))
                self._open[handle][1] += done
            return done

        return call

    def _close_of(self, real):
        def call(handle):
            self._open.pop(handle, None)
            return real(handle)

        return call

    def _fsync_of(self, real):
        def call(handle):
            path = self._below(os.readlink(f"/proc/self/fd/{handle}"))
            if path is not None:
                self.add(*(("flush names", str(path)) if path.is_dir() else ("flush", self._files[path])))
            return real(handle)

        return call

    def _replace_of(self, real):
        def call(source, target, *, src_dir_fd=None, dst_dir_fd=None):
            one, two = self._below(source, src_dir_fd), self._below(target, dst_dir_fd)
            real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            if one is not None and two is not None:
                self._files[two] = self._files.pop(one)
                self._names((one, None), (two, self._files[two]))

        return call

    def _unlink_of(self, real):
        def call(path, *, dir_fd=None):
            here = self._below(path, dir_fd)
            real(path, dir_fd=dir_fd)
            if here is not None:
                self._names((here, None))

        return call

    def _mkdir_of(self, real):
        def call(path, *more, dir_fd=None):
            real(path, *more, dir_fd=dir_fd)
            here = self._below(path, dir_fd)
            if here is not None:
                self.add("folder", str(here))
                self._names((here, str(here)))

        return call


def crashes(log: list[tuple[Any, ...]], root: Path, begin: int = 1) -> list[frozenset[tuple[str, bytes]]]:
    """The trees that a crash could leave once at least `begin` entries of the log have happened."""
    disk, found = Disk(), {}
    for count, entry in enumerate(log, 1):
        disk.do(*entry)
        if count >= begin:
            found |= dict.fromkeys(disk.trees(str(root)))
    return list(found)


def rebuilt(tree: frozenset[tuple[str, bytes]], root: Path, folder: Path) -> Path:
    """Makes a tree anew in an empty folder."""
    for path, content in sorted(tree):
        here = folder / Path(path).relative_to(root)
        if content == b"/":
            here.mkdir()
        else:
            here.write_bytes(content)
    return folder
