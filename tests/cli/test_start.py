"""Help, lists and typos need no torch; and the messages about typos."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from cli_kit import call

import selectune
from selectune.cli import catalogue
from selectune.runs.demos import comparison

HEAVY = ("torch", "numpy", "numba", "transformers", "safetensors", "peft", "sklearn", "rich.progress")
_PROBE = """
import json, os, sys
from selectune.cli import main
try:
    main(%r)
except SystemExit as left:
    code = left.code
json.dump({"code": code, "loaded": [m for m in %r if m in sys.modules]}, sys.stderr)
"""
COMMANDS = ("train", "eval", "verify", "tasks", "methods", "demo", "plan", "bench", "doctor")
DELTA = ("show", "diff", "apply", "add", "scale", "ties", "dare", "overlap")


def fresh(*args: str) -> tuple[int, str, str, list[str]]:
    """A command in a process of its own: exit code, stdout, stderr, and what of HEAVY it loaded."""
    run = subprocess.run(
        [sys.executable, "-c", _PROBE % (list(args), HEAVY)],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(selectune.__file__).parent.parent)},
    )  # fmt: skip
    said, brace, seen = run.stderr.rpartition("{")
    found = json.loads(brace + seen)
    return found["code"], run.stdout, said, found["loaded"]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("--help",), 0),
        (("--version",), 0),
        (("tasks",), 0),
        (("methods",), 0),
        (("methods", "--json"), 0),
        ((), 2),
        (("trian",), 2),
        (("delta", "shwo"), 2),
        (("train", "--modle", "x"), 2),
        (("train", "--model", "x"), 2),
        (("train", "-m", "x", "-t", "y", "-o", "z", "--budget", "many"), 2),
    ],
)
def test_nothing_heavy_is_loaded(args, code):
    found = fresh(*args)
    assert found[0] == code, found
    assert not found[3]


def test_no_help_loads_anything_heavy():
    """All of them in one process, through the same command line."""
    calls = [[c, "--help"] for c in COMMANDS] + [["delta", c, "--help"] for c in DELTA]
    code = (
        "import sys\nfrom selectune.cli import main\n"
        f"for args in {calls}:\n"
        "    try:\n        main(args)\n    except SystemExit as left:\n        assert left.code == 0, args\n"
        f"    assert not [m for m in {HEAVY} if m in sys.modules], args\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Usage: ") == len(calls)


def test_the_version():
    assert call("--version").stdout == f"selectune {selectune.__version__}, torch {metadata.version('torch')}\n"


def test_the_version_without_torch(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert call("--version").stdout == f"selectune {selectune.__version__}, torch is not installed\n"


def test_the_kept_list_of_methods_is_the_codes():
    told = "python -m selectune.cli.catalogue writes the list anew"
    assert catalogue.methods() == catalogue.found(), told
    assert catalogue.FILE.read_text(encoding="utf-8") == catalogue.written(catalogue.found()), told
    assert catalogue.tasks() == catalogue.found_tasks(), told
    assert catalogue.TASKS_FILE.read_text(encoding="utf-8") == catalogue.written(catalogue.found_tasks()), told


def test_the_demo_tells_its_budget():
    assert f"Default: {comparison.BUDGET:.2%}, " in " ".join(call("demo", "--help").stdout.replace("│", " ").split())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("trian",), "Did you mean 'train'?"),
        (("delta", "shwo"), "Did you mean 'show'?"),
        (("--vrsion",), "There is no option --vrsion. Did you mean --version?"),
        (("train", "--modle", "x"), "There is no option --modle. Did you mean --model?"),
        (("delta", "add", "a", "--otu", "x"), "There is no option --otu. Did you mean --out?"),
        (("train", "--qqq", "x"), "There is no option --qqq. See "),
        (("train", "-m", "x"), "Missing option '--out' / '-o'. See "),
        (("tasks", "more"), "unexpected extra argument"),
        (("eval", "-m", "x", "-t", "rte"), "Did you mean glue/rte?"),
        (("eval", "-m", "x", "-t", "GLUE/sts-b"), "Did you mean glue/stsb?"),
        (("verify", "-m", "x", "-d", ".", "-t", "glue/colla"), "Did you mean glue/cola?"),
        (("train", "-m", "x", "-t", "glue/rte", "-o", "z", "--method", "bitfti"), "Did you mean bitfit?"),
        (("train", "-m", "x", "-t", "glue/rte", "-o", "z", "-b", "9", "--on", "Lroa:r=2"), "Did you mean lora?"),
        (("train", "-m", "x", "-t", "glue/rte", "-o", "z", "--method", "lora:rnk=2"), "lora takes no option rnk"),
        (("plan", "-m", "tiny", "--method", "bitfti@3"), "Did you mean bitfit?"),
        (("bench", "--methods", "id_3"), "Did you mean id3?"),
    ],
)
def test_a_typo_is_one_line_with_the_nearest_name(args, said):
    found = call(*args, code=2)
    assert found.stdout == ""
    assert said in found.stderr
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1


def test_a_command_line_that_cannot_start_says_so(tmp_path):
    """A broken typer: one line, and 1."""
    (tmp_path / "typer").mkdir()
    (tmp_path / "typer" / "__init__.py").write_text("raise ImportError('half a package')\n", encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "selectune", "doctor"], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(selectune.__file__).parent.parent}"},
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith("error: The command line cannot start: half a package. ")
    assert run.stderr.count("\n") == 1
