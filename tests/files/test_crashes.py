"""Power losses at every moment: what is read back is the old or the new, and the new once the writer has returned."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import pytest
from crash_kit import Recorder, crashes, rebuilt

from selectune.errors import CheckpointError
from selectune.files import checkpoints, durable, make_folder, seal, sweep, verify, write_durably

OLD, NEW = b"an old delta", b"a new delta that is longer"
KILLS = int(os.environ.get("KILLS", "40"))  # 500 in the long form


def read(path):
    return path.read_bytes() if path.exists() else None


class Replays:
    """Rebuilds trees one after the other, each in an empty folder."""

    def __init__(self, root, spare):
        self.root, self.spare, self.count = root, spare, 0

    def __call__(self, tree):
        self.count += 1
        shutil.rmtree(self.spare, ignore_errors=True)
        self.spare.mkdir()
        return rebuilt(tree, self.root, self.spare)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture
def replay(root, tmp_path):
    return Replays(root, tmp_path / "again")


def recorded(root, monkeypatch, existing):
    """The log of a save over a file that is there already, or over none; and where in it the save begins."""
    with monkeypatch.context() as patch:
        recorder = Recorder(root, patch, piece=7)
        if existing:
            write_durably(root / "delta", OLD)
        begin = len(recorder.log)
        write_durably(root / "delta", NEW)
    return recorder.log, begin


@pytest.mark.parametrize("existing", [True, False])
def test_a_file_is_the_old_or_the_new(root, replay, monkeypatch, tries, existing):
    log, begin = recorded(root, monkeypatch, existing)
    old = OLD if existing else None
    found = set()
    for tree in crashes(log, root, begin):
        folder = replay(tree)
        found.add(read(folder / "delta"))
        sweep(folder)
        assert os.listdir(folder) in ([], ["delta"])
    assert found == {old, NEW}
    assert {read(replay(tree) / "delta") for tree in crashes(log, root, len(log))} == {NEW}
    tries(replay.count)
    assert replay.count > 50


def test_the_replay_sees_a_writer_that_flushes_nothing(root, replay, monkeypatch):
    """The model of the disk can fail: without a flush of the file, or with one that comes late, garbage is possible."""
    log, begin = recorded(root, monkeypatch, True)
    flushes = [n for n, entry in enumerate(log) if n >= begin and entry[0] == "flush"]
    names = [n for n, entry in enumerate(log) if n >= begin and entry[0] == "flush names"]
    rename = max(n for n, entry in enumerate(log) if entry[0] == "names")
    unflushed = [entry for n, entry in enumerate(log) if n not in flushes]
    assert any(read(replay(tree) / "delta") not in (None, OLD, NEW) for tree in crashes(unflushed, root))
    late = [*log[: flushes[0]], *log[flushes[0] + 1 : rename + 1], log[flushes[0]], *log[rename + 1 :]]
    assert any(read(replay(tree) / "delta") not in (None, OLD, NEW) for tree in crashes(late, root))
    no_names = [entry for n, entry in enumerate(log) if n not in names]
    assert any(read(replay(tree) / "delta") == OLD for tree in crashes(no_names, root, len(no_names)))


FILES = {"a.bin": b"moments", "inner/c.json": b"{}", "b.bin": b"offsets"}


def checkpoint(recorder, step, content=b""):
    """A folder as the Trainer writes it, without a flush; then it is sealed."""
    name = f"checkpoint-{step}"
    for file, data in FILES.items():
        for folder in reversed((recorder.root / name / file).relative_to(recorder.root).parents[:-1]):
            if not (recorder.root / folder).exists():
                os.mkdir(recorder.root / folder)
        recorder.create(f"{name}/{file}", data + content)
    seal(recorder.root / name, {"step": step})


def newest(folder):
    """The step of the newest checkpoint that is whole, or None. One with a manifest must be what was sealed."""
    for path in checkpoints(folder):
        try:
            found = verify(path)
        except CheckpointError as error:
            assert "is incomplete" in str(error), error  # noqa: PT017  (never damaged: the manifest came last)
            continue
        step = found.about["step"]
        assert {name: read(path / name) for name in found.files} == {n: d + b"%d" % step for n, d in FILES.items()}
        return step
    return None


def test_a_checkpoint_is_whole_or_incomplete_and_the_one_before_is_kept(root, replay, monkeypatch, tries):
    with monkeypatch.context() as patch:
        recorder = Recorder(root, patch)
        checkpoint(recorder, 1, b"1")
        begin = len(recorder.log)
        checkpoint(recorder, 2, b"2")
    assert {newest(replay(tree)) for tree in crashes(recorder.log[:begin], root)} == {None, 1}
    assert {newest(replay(tree)) for tree in crashes(recorder.log, root, begin)} == {1, 2}
    assert {newest(replay(tree)) for tree in crashes(recorder.log, root, len(recorder.log))} == {2}
    tries(replay.count)
    assert replay.count > 200


def test_the_replay_sees_a_manifest_that_comes_too_early(root, replay, monkeypatch):
    with monkeypatch.context() as patch:
        recorder = Recorder(root, patch)
        checkpoint(recorder, 1, b"1")
    log = list(recorder.log)
    log.remove(next(entry for entry in log if entry[0] == "flush"))
    with pytest.raises(AssertionError, match="damaged"):
        _ = [newest(replay(tree)) for tree in crashes(log, root)]


def test_folders_are_there_once_they_were_made(root, replay, monkeypatch):
    with monkeypatch.context() as patch:
        recorder = Recorder(root, patch)
        make_folder(root / "runs" / "one")
    assert [(replay(tree) / "runs" / "one").is_dir() for tree in crashes(recorder.log, root, len(recorder.log))] == [
        True
    ]


def test_a_writer_that_is_killed_loses_nothing_that_it_said_was_there(tmp_path, tries):
    """SIGKILL at any time in a save: the last generation that was acknowledged, or the one after it, and no other."""
    path, rng = tmp_path / "delta", random.Random(0)
    of = lambda number: b"%d " % number * 3000  # noqa: E731
    write_durably(path, of(0))
    last, left = 0, 0
    for _ in range(KILLS):
        heard, said = os.pipe()
        child = os.fork()
        if not child:
            for number in range(last + 1, last + 100_000):
                durable.write_durably(path, of(number))
                os.write(said, b"%8d" % number)
            os._exit(1)
        os.close(said)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        with os.fdopen(heard, "rb") as pipe:
            acknowledged = pipe.read()
        last = int(acknowledged[-8:] or last)
        content = path.read_bytes()
        assert content in (of(last), of(last + 1))
        last = int(content.split()[0])
        left += len(swept := sweep(tmp_path))
        assert len(swept) <= 1
        assert os.listdir(tmp_path) == ["delta"]
    tries(KILLS)
    assert left > 0
