"""Paths that are no delta's file: pickles, pipes, folders, devices, sparse terabytes."""

from __future__ import annotations

import io
import os
import pickle
import time

import pytest
import torch
from delta_kit import small
from safetensors import torch as files

from selectune.delta import Delta, load
from selectune.errors import DeltaError, DeltaFormatError

MODEL, DELTA = small()
GOOD = DELTA.to_bytes()


class Canary:
    """Runs when unpickled."""

    woken = False

    def __reduce__(self):
        return (_wake, ())


def _wake():
    Canary.woken = True


def _pickles() -> dict[str, bytes]:
    found = {f"protocol {i}": pickle.dumps(Canary(), protocol=i) for i in range(6)}
    buffer = io.BytesIO()
    torch.save({"w": Canary()}, buffer)
    found["torch.save"] = buffer.getvalue()
    buffer = io.BytesIO()
    torch.save({"w": Canary()}, buffer, _use_new_zipfile_serialization=False)
    found["torch.save of old"] = buffer.getvalue()
    return found


@pytest.mark.parametrize("name", ["delta.safetensors", "m.bin", "m.pt", "m.pth", "m.pkl", "m.ckpt", "x"])
@pytest.mark.parametrize("kind", _pickles().keys())
def test_pickles_are_refused_and_never_run(tmp_path, name, kind):
    (tmp_path / name).write_bytes(_pickles()[kind])
    Canary.woken = False
    with pytest.raises(DeltaFormatError):
        load(tmp_path / name)
    assert not Canary.woken


@pytest.mark.parametrize("kind", ["protocol 2", "protocol 5", "torch.save", "torch.save of old"])
def test_pickles_get_a_sentence(kind):
    with pytest.raises(DeltaFormatError, match="never opens"):
        Delta.from_bytes(_pickles()[kind])


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder" / "delta.safetensors").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, error in [
        ("fifo", DeltaFormatError),
        ("folder", DeltaFormatError),
        ("loop", DeltaError),
        ("missing", DeltaError),
        ("missing/folder", DeltaError),
    ]:
        with pytest.raises(error, match=name):
            load(tmp_path / name)
    with pytest.raises(DeltaFormatError, match="regular"):
        load("/dev/zero")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeltaError, match=r"holds no delta\.safetensors"):
        load(tmp_path / "empty")


def test_a_sparse_terabyte_is_refused_at_once(tmp_path):
    with open(tmp_path / "zeros", "wb") as file:
        file.truncate(1 << 40)
    with open(tmp_path / "headed", "wb") as file:
        file.write(GOOD)
        file.truncate(1 << 35)
    start = time.perf_counter()
    for name in ("zeros", "headed"):
        with pytest.raises(DeltaFormatError, match=name):
            load(tmp_path / name)
    assert time.perf_counter() - start < 3.0


def test_symbolic_links_are_read_through(tmp_path):
    DELTA.save(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real" / "delta.safetensors")
    assert load(tmp_path / "link") == load(tmp_path / "link.safetensors") == DELTA


def test_only_a_delta_is_overwritten(tmp_path):
    path = tmp_path / "model.safetensors"
    for content in (files.save(dict(MODEL.state_dict()), {"format": "pt"}), b"notes"):
        path.write_bytes(content)
        with pytest.raises(DeltaError, match="is there and is no delta; only a delta is overwritten"):
            DELTA.save(path)
        assert path.read_bytes() == content
    for content in (b"", GOOD, GOOD[:-3]):  # nothing is lost; our own; our own, damaged
        path.write_bytes(content)
        DELTA.save(path)
        assert load(path) == DELTA
