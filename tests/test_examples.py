"""Each script of examples/ runs by itself, offline and outside the checkout, and prints what it is about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"trainer": "transformers", "trl_sft": "trl", "grpo": "trl"}
LINES = 50


def printed(path: Path, folder: Path) -> str:
    if path.stem in NEEDS and find_spec(NEEDS[path.stem]) is None:
        pytest.skip(f"examples/{path.name} needs {NEEDS[path.stem]}")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(path)]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return run.stdout


def own_loop(text: str) -> None:
    assert "tuned, 60 of 580 scalars" in text
    scores = {name: float(score) for name, score in re.findall(r"^(base|tuned|reverted).*: (0\.\d+)$", text, re.M)}
    assert scores["reverted"] < 0.2 < 0.5 < scores["tuned"]


def trainer(text: str) -> None:
    assert "stopped after step 5" in text
    assert "the delta of the run that was not stopped: True" in text


def trl_sft(text: str) -> None:
    assert "scalars that differ from the base: 200 of 200" in text
    found = re.search(r"loss (\S+), then (\S+)", text)
    assert found is not None
    assert float(found[2]) < float(found[1])


def combine_deltas(text: str) -> None:
    rows = dict(re.findall(r"^(\S.*?)\s+(-?\d\.\d\d)\s+-?\d\.\d\d$", text, re.M))
    assert list(rows) == ["base", "left", "right", "half left", "mean", "ties"]
    assert float(rows["base"]) < float(rows["half left"]) < float(rows["left"])


def policy_sync(text: str) -> None:
    assert "the server has the trainer's bits: True" in text
    found = re.search(r"reward (\S+), then (\S+)", text)
    assert found is not None
    assert float(found[2]) > 2 * float(found[1])


def grpo(text: str) -> None:
    assert "the server has the trainer's bits: True" in text
    sent = re.search(r"scalars sent: \[(\d+), (\d+), (\d+)\]", text)
    assert sent is not None
    assert 0 < int(sent[1]) < int(sent[2]) < int(sent[3]) <= 200


def own_score(text: str) -> None:
    losses = {name: float(loss) for name, loss in re.findall(r"^(\w+) +selected 60 of 60, loss (\S+)$", text, re.M)}
    assert losses["taylor"] < losses["random"]


CHECKS = {check.__name__: check for check in (own_loop, trainer, trl_sft, combine_deltas, own_score, policy_sync, grpo)}


def test_every_example_has_a_check():
    assert {path.stem for path in EXAMPLES} == set(CHECKS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    text = printed(path, tmp_path)
    CHECKS[path.stem](text)
    assert not list(tmp_path.iterdir())  # files go to a temporary folder, not to where one stands


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_says_how_to_run_it(path):
    text = path.read_text("utf-8")
    assert text.count("\n") <= LINES
    assert f"python examples/{path.name}" in text.partition('"""\n')[0]
