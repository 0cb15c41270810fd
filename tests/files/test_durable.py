"""The writer: whatever fails, the old file is intact and the temp file is gone."""

from __future__ import annotations

import errno
import os
import socket
import stat

import pytest

from selectune.delta import Delta, load
from selectune.errors import DeltaError, DeltaFormatError, ModelError, RunFolderError
from selectune.files import durable, make_folder, own, read_owned, write_durably
from selectune.models.bases import resolve

OLD, NEW = b"old bytes", b"new bytes, longer" * 100
CALLS = ["open", "write", "fchmod", "fsync", "close", "replace", "stat"]


class Shim:
    """The os module, logging calls and failing at the k-th of them."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None, only: str | None = None):
        self.log: list[str] = []
        self.fail_at, self.error, self.only = fail_at, error, only

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args, **kwargs):
            if self.only in (None, name):
                if len(self.log) == self.fail_at:
                    self.log.append(name)
                    if name == "close":
                        real(*args, **kwargs)
                    raise self.error
                self.log.append(name)
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["disk full", "interrupt"]
)
def test_failure_at_every_call(tmp_path, monkeypatch, tries, existing, error):
    path = tmp_path / "delta.safetensors"
    for k in range(100):
        for file in tmp_path.iterdir():
            file.unlink()
        if existing:
            path.write_bytes(OLD)
        shim = Shim(k, error)
        monkeypatch.setattr(durable, "os", shim)
        try:
            write_durably(path, NEW)
            break
        except (DeltaError, KeyboardInterrupt) as caught:
            raised = caught
        finally:
            monkeypatch.setattr(durable, "os", os)
        if isinstance(raised, DeltaError):
            assert str(path) in str(raised)
            assert "No space" in str(raised)
            assert isinstance(raised.__cause__, OSError)
        else:
            assert isinstance(error, KeyboardInterrupt)
        renamed = "replace" in shim.log and shim.log.index("replace") != k
        assert [file.name for file in tmp_path.iterdir()] == ([path.name] if existing or renamed else [])
        if existing or renamed:
            assert path.read_bytes() == (NEW if renamed else OLD)
    tries(k)
    assert k >= 8
    assert path.read_bytes() == NEW


def test_the_order_of_calls_survives_a_power_loss(tmp_path, monkeypatch):
    shim = Shim()
    monkeypatch.setattr(durable, "os", shim)
    write_durably(tmp_path / "x", NEW)
    seen = [name for name in shim.log if name in ("write", "fsync", "replace")]
    assert seen == ["write", "fsync", "replace", "fsync"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    class Short:
        def __getattr__(self, name):
            return (lambda fd, data: os.write(fd, data[:7])) if name == "write" else getattr(os, name)

    monkeypatch.setattr(durable, "os", Short())
    write_durably(tmp_path / "x", NEW)
    assert (tmp_path / "x").read_bytes() == NEW


def test_a_directory_that_cannot_be_flushed_is_no_error_where_it_is_not_supported(tmp_path, monkeypatch):
    calls = []

    class NoFlush:
        def __getattr__(self, name):
            def fsync(handle):
                calls.append(handle)
                if stat.S_ISDIR(os.fstat(handle).st_mode):
                    raise OSError(errno.EINVAL, "Invalid argument")

            return fsync if name == "fsync" else getattr(os, name)

    monkeypatch.setattr(durable, "os", NoFlush())
    write_durably(tmp_path / "x", NEW)
    assert len(calls) == 2


def test_mode_follows_the_umask_or_the_file_it_replaces(tmp_path):
    before = os.umask(0o027)
    try:
        write_durably(tmp_path / "new", NEW)
        (tmp_path / "old").write_bytes(OLD)
        os.chmod(tmp_path / "old", 0o604)
        write_durably(tmp_path / "old", NEW)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o604


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    (tmp_path / "victim").write_bytes(OLD)
    (tmp_path / "x").symlink_to(tmp_path / "victim")
    write_durably(tmp_path / "x", NEW)
    assert (tmp_path / "victim").read_bytes() == OLD
    assert not (tmp_path / "x").is_symlink()
    assert (tmp_path / "x").read_bytes() == NEW


@pytest.mark.parametrize("where", ["missing/x", "file/x", "folder"])
def test_paths_that_cannot_be_written(tmp_path, where):
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DeltaError, match=where):
        write_durably(tmp_path / where, NEW)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


def test_reading_owns_what_it_read(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(NEW)
    data = read_owned(path)
    path.write_bytes(OLD)
    assert bytes(data) == NEW


def test_what_cannot_be_read(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
        with pytest.raises(DeltaFormatError, match="not a regular file"):
            read_owned(tmp_path / "socket")
    (tmp_path / "x").write_bytes(NEW)

    class Fails:
        def __getattr__(self, name):
            def readv(*args):
                raise OSError(errno.EIO, "Input/output error")

            return readv if name == "readv" else getattr(os, name)

    monkeypatch.setattr(durable, "os", Fails())
    with pytest.raises(DeltaError, match=r"cannot read .*x: Input/output error"):
        read_owned(tmp_path / "x")


def test_an_interrupt_just_after_the_rename_leaves_the_new_file(tmp_path, monkeypatch):
    class Late:
        def __getattr__(self, name):
            def replace(*args, **where):
                os.replace(*args, **where)
                raise KeyboardInterrupt

            return replace if name == "replace" else getattr(os, name)

    monkeypatch.setattr(durable, "os", Late())
    with pytest.raises(KeyboardInterrupt):
        write_durably(tmp_path / "x", NEW)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == NEW


def test_reading_is_limited_and_checked_by_the_head_first(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(NEW)
    with pytest.raises(DeltaFormatError, match="too large"):
        read_owned(path, limit=10)
    seen = []
    read_owned(path, head=(4, lambda head, size: seen.append((bytes(head), size))))
    assert seen == [(NEW[:4], len(NEW))]


@pytest.mark.parametrize(("change", "message"), [(b"", "shrank"), (NEW + NEW, "grew")])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change, message):
    path = tmp_path / "x"
    path.write_bytes(NEW)
    with pytest.raises(DeltaFormatError, match=message):
        read_owned(path, head=(4, lambda head, size: path.write_bytes(change)))


def test_folders_that_are_made_are_flushed_into_those_above(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def noted(handle):
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    made = make_folder(tmp_path / "a" / "b" / "c")
    assert made == [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"]
    assert flushed == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    assert make_folder(tmp_path / "a") == []


@pytest.mark.parametrize("path", ["a\0b", "a\0b/x.safetensors"])
def test_a_name_that_no_path_can_have(tmp_path, path):
    delta = Delta([], [], {"base": {"structure": "0" * 64}})
    for call in (lambda: delta.save(tmp_path / path), lambda: load(tmp_path / path)):
        with pytest.raises(DeltaError, match=r"no path can hold|null byte"):
            call()
    with pytest.raises(RunFolderError, match="no path can hold such a character"):
        own(tmp_path / path, "x").__enter__()
    with pytest.raises(ModelError, match="NUL character"):
        resolve(path)
