"""A complete folder has a manifest, written last, that names every file with its size and sha256."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectune.errors import CheckpointError, DeltaError
from selectune.files.durable import flush_folder, write_durably
from selectune.files.reading import read_json, some

MANIFEST = "manifest.json"
VERSION = 1
LIMIT = 1 << 22
"""Largest manifest that is read, in bytes: some 40,000 files."""

_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")  # as transformers names them
_NAME = re.compile(r"[^/\0]+(/[^/\0]+)*")


@dataclass(frozen=True)
class Manifest:
    """The content of a sealed folder. `about`: its writer's remarks, such as the step."""

    folder: Path
    files: Mapping[str, tuple[int, str]]  # name below the folder: size in bytes, sha256
    about: Mapping[str, Any]


def seal(folder: str | os.PathLike[str], about: Mapping[str, Any]) -> Path:
    """Make a folder durable and complete: flush every file in it, then write its manifest.

    Each file is read once, for its sha256, and flushed to the disk, and then the folders, up to the root. The manifest
    comes last, so a folder that has one has all files that it names, also after a power loss. `about` is plain JSON.

    Raises DeltaError that names the path; there is no manifest then.
    """
    folder = Path(folder)
    target = folder / MANIFEST
    try:
        target.unlink(missing_ok=True)
        files = {}
        for path in _files(folder):
            size, digest = _read(path, flush=True)
            files[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
        for inner in sorted({path.parent for path in _files(folder)} | {folder}, reverse=True):
            flush_folder(inner)
        for parent in folder.resolve().parents:
            flush_folder(parent)
    except OSError as error:
        raise DeltaError(f"cannot complete {folder}: {error.strerror or error} ({error.filename})") from error
    told = {"version": VERSION, "about": dict(about), "files": files}
    return write_durably(target, json.dumps({**told, "sha256": _digest(told)}, indent=1).encode())


def verify(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a folder, if it has every file that the manifest names, bit for bit: one read of them all.

    Other files are ignored. Raises CheckpointError that names the faults.
    """
    found = read_manifest(folder)
    problems = []
    for name, (size, digest) in found.files.items():
        try:
            problem = _problem(found.folder / name, size, digest)
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})"
        if problem:
            problems.append(f"{name} {problem}")
    if problems:
        raise CheckpointError(f"{found.folder} is damaged: {some(problems, ', ', 3)}.")
    return found


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """A folder's manifest, without a look at the files; raises CheckpointError if it is missing or damaged."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is incomplete: it has no {MANIFEST}, which is written last. The process may have stopped while "
            "it was written."
        )
    try:
        told = read_json(path, limit=LIMIT, error=CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    try:
        digest = told.pop("sha256")
        version, about, files = told["version"], dict(told["about"]), told["files"]
        listed = {name: (file["size"], file["sha256"]) for name, file in files.items()}
        whole = digest == _digest(told) and version == VERSION
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: it is not what a manifest looks like ({error!r}).") from error
    if not whole or not all(_NAME.fullmatch(name) and ".." not in name.split("/") for name in listed):
        raise CheckpointError(f"{path} is damaged: its content does not have the sha256 it was written with.")
    return Manifest(folder, listed, about)


def checkpoints(folder: Path) -> list[Path]:
    """The folders of checkpoints in a run's folder, complete or not, newest first by their step."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def _files(folder: Path) -> Iterator[Path]:
    """The regular files below a folder, without symbolic links."""
    for here, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(here, name)
            if stat.S_ISREG(path.lstat().st_mode):
                yield path


def _read(path: Path, flush: bool = False) -> tuple[int, str]:
    """(size, sha256) of a regular file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
        return file.tell(), digest


def _problem(path: Path, size: int, digest: str) -> str:
    """The fault of a file, or ""."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return "is missing"
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    if found.st_size != size:
        return f"has {found.st_size:,} bytes, not {size:,}"
    return "" if _read(path) == (size, digest) else "has other content than was written"


def _digest(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
