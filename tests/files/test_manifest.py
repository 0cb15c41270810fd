"""A folder with a manifest is complete: damage to any file that it names is reported, and it is written last."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest

from selectune.errors import CheckpointError, DeltaError
from selectune.files import MANIFEST, durable, manifest, read_manifest, seal, sweep, verify

FILES = {"a.bin": b"\x00" * 5000, "b.json": b'{"x": 1}', "empty": b"", "inner/c.bin": bytes(range(256)) * 9}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "checkpoint-3"
    for name, content in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    seal(made, {"step": 3})
    return made


def test_what_was_sealed(folder):
    found = verify(folder)
    assert {name: size for name, (size, _) in found.files.items()} == {n: len(c) for n, c in FILES.items()}
    assert found.about == {"step": 3}
    (folder / "later.txt").write_text("of somebody else")
    assert verify(folder) == found
    seal(folder, {"step": 4})
    assert "later.txt" in verify(folder).files


def flip(path, rng):
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data) * 8)
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


HARMS = {
    "flip": flip,
    "cut": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    "grow": lambda path, rng: path.write_bytes(path.read_bytes() + b"\x00"),
    "empty": lambda path, rng: path.write_bytes(b""),
    "gone": lambda path, rng: path.unlink(),
    "folder": lambda path, rng: (path.unlink(), path.mkdir()),
    "pipe": lambda path, rng: (path.unlink(), os.mkfifo(path)),
    "dangling": lambda path, rng: (path.unlink(), path.symlink_to("nowhere")),
    "loop": lambda path, rng: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["a.bin", "b.json", "inner/c.bin", MANIFEST])
def test_any_harm_is_told(folder, harm, name):
    rng = random.Random(f"{harm} {name}")
    HARMS[harm](folder / name, rng)
    with pytest.raises(CheckpointError, match=r"(is damaged|is incomplete|cannot be read)") as told:
        verify(folder)
    assert name in str(told.value)


def test_two_files_that_changed_places(folder):
    os.rename(folder / "a.bin", folder / "d.bin")
    os.rename(folder / "inner" / "c.bin", folder / "a.bin")
    os.rename(folder / "d.bin", folder / "inner" / "c.bin")
    with pytest.raises(CheckpointError, match=r"damaged: a\.bin .* inner/c\.bin"):
        verify(folder)


def test_every_bit_of_a_manifest(folder, tries):
    whole = (folder / MANIFEST).read_bytes()
    tries(len(range(0, len(whole) * 8, 7)))
    found = verify(folder)
    for at in range(0, len(whole) * 8, 7):
        data = bytearray(whole)
        data[at // 8] ^= 1 << at % 8
        (folder / MANIFEST).write_bytes(data)
        try:
            assert verify(folder) == found  # white space
        except CheckpointError as error:
            assert str(folder) in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "inner/../../outside", "", "a//b", "x\0y"])
def test_a_manifest_names_files_below_it_only(folder, name, tmp_path):
    (tmp_path / "outside").write_bytes(b"")
    told = json.loads((folder / MANIFEST).read_bytes())
    del told["sha256"]
    told["files"][name] = {"size": 0, "sha256": manifest.hashlib.sha256().hexdigest()}
    (folder / MANIFEST).write_text(json.dumps({**told, "sha256": manifest._digest(told)}))
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "1" * 5000, '{"sha256": "\\ud800"}', "[" * 100_000])
def test_what_is_no_manifest(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        verify(folder)


def test_all_that_a_manifest_names_is_on_the_disk_before_it(tmp_path, monkeypatch):
    """The order of calls: every file and folder is flushed, with its last content, before the manifest appears."""
    log: list[tuple[str, str]] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def flushed(handle):
        log.append(("flush", os.readlink(f"/proc/self/fd/{handle}")))
        return fsync(handle)

    def renamed(source, target, **where):
        log.append(("rename", str(target)))
        return replace(source, target, **where)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(os, "unlink", unlink)
    folder = tmp_path / "new" / "checkpoint-1"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    seal(folder, {})
    last = log.index(("rename", MANIFEST))
    before = {path for kind, path in log[:last] if kind == "flush"}
    assert {str(folder / name) for name in FILES} < before
    assert {str(p) for p in (folder, folder / "inner", tmp_path / "new", tmp_path)} < before
    assert ("flush", str(folder)) in log[last:]  # the manifest's own name


def test_a_file_that_cannot_be_flushed_leaves_no_manifest(folder, monkeypatch):
    def fails(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest.os, "fsync", fails)
    with pytest.raises(DeltaError, match=r"cannot complete .*checkpoint-3: No space left"):
        seal(folder, {"step": 3})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="incomplete"):
        verify(folder)


def test_what_dead_writers_left_is_swept(tmp_path):
    inner = tmp_path / "checkpoint-2"
    inner.mkdir()
    gone = [tmp_path / f".delta.safetensors.{'0a' * 8}.tmp", inner / f".manifest.json.{'1b' * 8}.tmp"]
    kept = [tmp_path / "notes.tmp", tmp_path / ".hidden.tmp", inner / f"x.{'0a' * 8}.tmp"]
    for path in (*gone, *kept):
        path.write_text("")
    assert [*sweep(tmp_path), *sweep(inner)] == [path.name for path in gone]
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in kept)


def test_the_name_of_a_temporary_file_is_one_that_is_swept(tmp_path, monkeypatch):
    def dies(*args, **kwargs):
        os._exit(9)

    child = os.fork()
    if not child:
        durable.os.replace = dies
        durable.write_durably(tmp_path / "f", b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) == 1
    assert len(sweep(tmp_path)) == 1
    shutil.rmtree(tmp_path)
