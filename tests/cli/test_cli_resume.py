"""`selectune train --resume` after Ctrl-C and after a kill, and its refusals; `eval` of a delta that does not exist."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from cli_kit import call

from selectune.runs.progress import RunCallback

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture
def command(tiny, data):
    return (
        "train", "--model", tiny, "--task", "glue/rte", "--budget", 120, "--max-steps", 6, "--lr", "5e-3",
        "--data", data, "--seed", 3, "--batch-size", 8,
    )  # fmt: skip


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C in the fifth step."""
    original = RunCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self.stop.ask(signal.SIGINT)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunCallback, "on_step_end", on_step_end)
    return lambda: monkeypatch.setattr(RunCallback, "on_step_end", original)


def test_ctrl_c_says_how_to_go_on(command, tmp_path, interrupted):
    out = tmp_path / "out"
    found = call(*command, "--out", out, "--save-every", 2, code=130)
    assert f"stopped: after step 5 of 6, as asked. {out / 'checkpoint-5'} has all of it" in found.stderr
    assert "goes on from there (command line: --resume" in found.stderr
    assert found.stdout == ""
    interrupted()
    call(*command, "--out", tmp_path / "straight", "--save-every", 2)
    printed = json.loads(call(*command, "--out", out, "--save-every", 2, "--resume", "--json").stdout)
    assert (printed["resumed"], printed["steps"], printed["selected"]) == (5, 6, 120)
    straight = (tmp_path / "straight" / "delta.safetensors").read_bytes()
    assert (out / "delta.safetensors").read_bytes() == straight
    history = [json.loads((folder / "run.json").read_text())["history"] for folder in (out, tmp_path / "straight")]
    assert history[0] == history[1]
    other = tmp_path / "other"
    call(*command, "--out", other, "--resume-from", out / "checkpoint-2")
    assert (other / "delta.safetensors").read_bytes() == straight


def test_ctrl_c_saves_a_checkpoint_without_save_every(command, tmp_path, interrupted):
    call(*command, "--out", tmp_path / "out", code=130)
    interrupted()
    assert "holds checkpoints of a run that did not end" in call(*command, "--out", tmp_path / "out", code=2).stderr
    call(*command, "--out", tmp_path / "out", "--resume")
    call(*command, "--out", tmp_path / "straight")
    deltas = [(tmp_path / name / "delta.safetensors").read_bytes() for name in ("out", "straight")]
    assert deltas[0] == deltas[1]


def test_other_settings_and_no_checkpoint(command, tmp_path):
    out = tmp_path / "out"
    assert "no checkpoint to resume" in call(*command, "--out", out, "--resume", code=2).stderr
    assert "does not exist" in call(*command, "--out", out, "--resume-from", out / "checkpoint-2", code=2).stderr
    call(*command, "--out", out, "--save-every", 3)
    assert "run.json and delta.safetensors of an earlier run" in call(*command, "--out", out, code=2).stderr
    found = call(*command, "--out", out, "--resume", "--lr", "1e-3", "--warmup", 2, code=2)
    assert "lr (0.005 there, 0.001 now), warmup (0.0 there, 2.0 now)" in found.stderr


def test_a_process_that_is_killed(command, tmp_path):
    """A run is killed as soon as a checkpoint is complete. A new process continues from what it finds."""
    out, long = tmp_path / "out", ("--max-steps", 100, "--save-every", 5)
    line = [sys.executable, "-m", "selectune", *map(str, (*command, *long, "--out", out))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process
    with subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env) as process:
        for _ in range(1200):
            if (out / "checkpoint-10" / "manifest.json").exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert not (out / "delta.safetensors").exists()
    (out / ".delta.safetensors.0123456789abcdef.tmp").write_text("of a writer that died")
    (out / "checkpoint-95").mkdir()
    (out / "checkpoint-95" / "optimizer.pt").write_text("half")
    printed = json.loads(call(*command, *long, "--out", out, "--resume", "--json").stdout)
    assert not [path.name for path in out.rglob("*") if path.name.endswith(".tmp") or path.name == ".selectune.lock"]
    assert printed["resumed"] >= 10
    call(*command, *long, "--out", tmp_path / "straight")
    assert (out / "delta.safetensors").read_bytes() == (tmp_path / "straight" / "delta.safetensors").read_bytes()


def test_eval_looks_for_the_delta_first(tiny, tmp_path):
    args = ("--model", tiny, "--task", "glue/rte", "--data", tmp_path / "no-data")
    found = call("eval", *args, "--delta", tmp_path / "no-delta", code=1)
    assert "no-delta" in found.stderr
    assert "no-data" not in found.stderr
