"""Ctrl-C and SIGTERM in a process of its own, from the first moment on: an exit code, a sentence, no traceback."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from cli_kit import call

from selectune.cli import signals

pytest_plugins = ("tiny_fixtures",)

TRIALS = int(os.environ.get("TRIALS", "6"))  # 40 in the long form: 20 of each signal


@pytest.fixture
def command(tiny, data):
    return (
        "train", "--model", tiny, "--task", "glue/rte", "--budget", 120, "--max-steps", 60, "--lr", "5e-3",
        "--data", data, "--seed", 3, "--batch-size", 8, "--eval-every", 10,
    )  # fmt: skip


def started(*args):
    line = [sys.executable, "-m", "selectune", *map(str, args)]
    return subprocess.Popen(
        line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.fixture(scope="module")
def straight():
    return {}


@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_run_is_resumable_or_says_why(command, tmp_path, straight, trial):
    number = (signal.SIGINT, signal.SIGTERM)[trial % 2]
    out = tmp_path / "out"
    process = started(*command, "--out", out)
    rng = random.Random(trial)
    if trial % 3 == 0:
        time.sleep(rng.uniform(0.1, 4.0))  # while it starts
    else:
        while process.poll() is None and not list(out.glob("checkpoint-*")) and not (out / ".selectune.lock").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 6.0))
    process.send_signal(number)
    printed, told = process.communicate(timeout=120)
    assert "Traceback" not in told
    if process.returncode == 0:  # it was over before
        assert (out / "delta.safetensors").exists()
        return
    assert process.returncode == 128 + number
    assert printed == ""
    if (out / "delta.safetensors").exists():
        assert "is whole; it was not measured" in told
        rest = out
    elif list(out.glob("checkpoint-*")):
        assert "stopped: after step" in told
        call(*command, "--out", out, "--resume")
        rest = out
    else:
        assert "before its first step, so nothing is lost" in told or "stopped: by" in told
        call(*command, "--out", out)
        rest = out
    if "delta" not in straight:
        call(*command, "--out", tmp_path / "straight")
        straight["delta"] = (tmp_path / "straight" / "delta.safetensors").read_bytes()
    assert (rest / "delta.safetensors").read_bytes() == straight["delta"]
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp") or path.name == ".selectune.lock"]


IN_A_FINALIZER = """
import signal, time
from selectune.cli import signals
signals.watch()
class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
try:
    Dying()
    time.sleep(20)
except signals.StoppedBySignal as stopped:
    print("stopped by", stopped.signal)
"""


def test_a_signal_in_a_finalizer_stops_a_moment_later():
    """Python ignores exceptions there, and would print a traceback and go on."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FINALIZER], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"stopped by {signal.SIGINT.value}\n"
    assert done.stderr == ""


def test_the_second_stops_at_once(tiny, data, tmp_path):
    """The first waits for a step that never ends; the second does not."""
    code = (
        "import sys, time; from selectune.cli import signals, main\n"
        "from selectune.runs.stop import Stop\n"
        "signals.watch(); stop = Stop(); signals.heed(stop); stop.listening = True\n"
        "print('ready', flush=True)\n"
        "end = time.monotonic() + 60\n"
        "while time.monotonic() < end: time.sleep(.05); stop.asked and print('asked', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        assert p.stdout.readline() == "ready\n"
        p.send_signal(signal.SIGTERM)
        assert p.stdout.readline() == "asked\n"
        p.send_signal(signal.SIGINT)
        _, told = p.communicate(timeout=20)
    assert p.returncode == 130
    assert "SIGTERM: finishing the step, then saving a checkpoint; a second one stops at once." in told
    assert "stopped: at once, by a second Ctrl-C" in told
    assert "Traceback" not in told


def test_two_runs_in_one_folder(command, tmp_path):
    out = tmp_path / "out"
    with started(*command, "--out", out) as first:
        while first.poll() is None and not (out / ".selectune.lock").exists():
            time.sleep(0.01)
        for more in ((), ("--resume",), ("--overwrite",)):
            found = call(*command, "--out", out, *more, code=2)
            assert f"in use by another run: process {first.pid}" in found.stderr
        first.send_signal(signal.SIGKILL)
        first.communicate()
    call(*command, "--out", out, "--max-steps", 2, "--overwrite")


def test_exit_codes_are_the_shells():
    assert [signals.exit_code(number) for number in signals.SIGNALS] == [130, 143]


KILLS = int(os.environ.get("KILLS", "4"))  # 60 in the long form


def test_kills_of_runs_that_share_a_folder(command, tmp_path, tries):
    """Two processes want one folder, and its owner is killed. The run ends with the bits of one that was not."""
    out, args = tmp_path / "out", (*command, "--save-every", 4)
    rng = random.Random(0)
    for _ in range(KILLS):
        both = [started(*args, "--out", out, *(("--resume",) if list(out.glob("checkpoint-*")) else ()))]
        time.sleep(rng.uniform(0.0, 0.5))
        both.append(started(*args, "--out", out, "--resume"))
        end = time.monotonic() + rng.uniform(3.0, 9.0)
        while time.monotonic() < end and any(process.poll() is None for process in both):
            time.sleep(0.02)
        for process in both:
            process.send_signal(signal.SIGKILL)
            _, told = process.communicate()
            assert "Traceback" not in told
            # killed, done, refused (the folder is in use, or has nothing to go on from yet, or is whole already)
            assert process.returncode in (-signal.SIGKILL, 0, 2)
    resumable = bool(list(out.glob("checkpoint-*/manifest.json")))
    call(*args, "--out", out, "--resume" if resumable else "--overwrite")
    call(*args, "--out", tmp_path / "straight")
    deltas = [(folder / "delta.safetensors").read_bytes() for folder in (out, tmp_path / "straight")]
    tries(KILLS)
    assert deltas[0] == deltas[1]
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp") or path.name == ".selectune.lock"]
    assert all((folder / "manifest.json").exists() for folder in out.glob("checkpoint-*"))


def test_a_signal_that_a_library_takes_for_its_own_error_is_a_stop(monkeypatch, tmp_path):
    """transformers' lazy imports turn any exception raised within them into a ModuleNotFoundError."""
    from cli_kit import call as within

    from selectune.cli import signals
    from selectune.errors import ModelError
    from selectune.models import bases

    def fails(*given, **more):
        signals._state.raised = signals.StoppedBySignal(signal.SIGTERM)
        raise ModelError("Could not import module 'BertForSequenceClassification'.")

    monkeypatch.setattr(bases, "load_model", fails)
    monkeypatch.setattr("selectune.runs.training.load_model", fails)
    words = ["train", "--model", "demo", "--task", "demo/topic", "--budget", "9", "--out", str(tmp_path / "out")]
    found = within(*words, code=128 + signal.SIGTERM)
    assert "stopped" in found.stderr.lower()
    signals._state.raised = None
