"""One process at a time owns a folder. When it ends, the folder is free again and nothing is left in it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from selectune.errors import RunFolderError
from selectune.files import own

HOLD = """
import sys, time
from selectune.files import own
with own(sys.argv[1], "x"):
    print("mine", flush=True)
    time.sleep(60)
"""


def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    return process


def test_another_process_is_refused_at_once_and_let_in_after_a_kill(tmp_path):
    folder = tmp_path / "run"
    process = holder(folder)
    try:
        began = time.monotonic()
        with pytest.raises(RunFolderError, match=rf"in use by another run: process {process.pid} on .*, since 2"):
            own(folder, "y").__enter__()
        assert time.monotonic() - began < 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with own(folder, "y") as mine:
        assert mine == folder
        with pytest.raises(RunFolderError, match="in use"):
            own(folder, "z").__enter__()
    assert not folder.exists() or not list(folder.iterdir())


def test_a_folder_that_was_made_for_nothing_goes(tmp_path):
    with own(tmp_path / "a" / "b", "x"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with own(tmp_path / "a" / "b", "x") as folder:
        (folder / "kept").write_text("")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_what_can_be_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunFolderError, match="file"):
            own(path, "x").__enter__()
    (tmp_path / ".selectune.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(RunFolderError, match="cannot be written into"):
        own(tmp_path, "x").__enter__()
    assert not (tmp_path / "victim").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="cannot be written into: Permission denied"):
        own(tmp_path / "run", "x").__enter__()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    """A run may write there, without the lock; any other fault of the lock is an error."""

    def fails(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fails)
    if number == errno.EIO:
        with pytest.raises(RunFolderError, match="cannot be written into: Input/output error"):
            own(tmp_path / "run", "x").__enter__()
    else:
        with own(tmp_path / "run", "x") as folder:
            (folder / "kept").write_text("")


def test_a_lock_whose_owner_has_written_nothing_readable(tmp_path):
    import fcntl

    with open(tmp_path / ".selectune.lock", "w") as held:
        held.write("not json")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match="is in use by another run"):
            own(tmp_path, "x").__enter__()


def test_many_that_want_it_at_once(tmp_path, tries):
    """Owners come and go, each removing the lock's file; at no time are there two."""
    code = (
        "import os, sys, time; from selectune.files import own; from selectune.errors import RunFolderError\n"
        "mine = 0\n"
        "while mine < 25:\n"
        "    try:\n"
        "        with own(sys.argv[1], 'x'):\n"
        "            os.close(os.open(sys.argv[1] + '/only', os.O_CREAT | os.O_EXCL)); time.sleep(.001)\n"
        "            os.unlink(sys.argv[1] + '/only'); mine += 1\n"
        "    except RunFolderError: time.sleep(.001)\n"
    )
    tmp_path.joinpath("keep").write_text("")
    line = [sys.executable, "-c", code, str(tmp_path)]
    for process in [subprocess.Popen(line) for _ in range(4)]:
        assert process.wait(timeout=120) == 0
    tries(4 * 25)
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]
