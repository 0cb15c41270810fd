"""`selectune doctor` on broken installations: each fault is one line that names the part, and the exit code is 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_kit import make_model
from torch import nn
from typer.testing import CliRunner

import selectune as st
from selectune.bench import meter
from selectune.cli.app import app
from selectune.doctor import candidate, checks, examine

pytest_plugins = ("tiny_fixtures",)


def package(folder: Path, name: str, code: str, version: str | None = "1.0") -> None:
    """A package that does something else than it should when it is imported."""
    (folder / f"{name}.py").write_text(code + "\n", encoding="utf-8")
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    text = "" if version is None else f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (about / "METADATA").write_text(text, encoding="utf-8")


def problems_of(*parts: str, patience: float = 60.0) -> dict[str, str]:
    names = [f"package {part}" for part in parts]
    _, problems, _ = examine.ask(names, None, patience)
    return {row["part"].removeprefix("package "): row["problem"] for row in problems}


def fits(text: str) -> bool:
    lines = text.rstrip("\n").split("\n")
    return len(lines) <= examine.LINES and max(map(len, lines)) <= examine.WIDTH


def test_this_installation_is_well():
    found = CliRunner().invoke(app, ["doctor", "--json"])
    assert found.exit_code == 0, found.output
    value = json.loads(found.stdout)
    assert value["ok"]
    assert not value["problems"]
    assert value["self_check"]["changed"] == 40
    assert value["packages"]["torch"] == torch.__version__
    assert value["devices"][0]["device"] == "cpu"
    assert value["backend"]["backends"]
    text = examine.page(value)
    assert text.startswith(f"selectune {st.__version__} works here.\n")
    assert fits(text)
    assert "kernels    " in text
    everything = examine.described(value)
    assert len(everything) > examine.LINES
    assert any("choices" in line for line in everything)


def test_broken_packages_are_named_and_the_rest_is_still_looked_at(tmp_path, monkeypatch):
    package(tmp_path, "peft", "1 / 0")
    package(tmp_path, "trl", "import sys; sys.exit('no licence')")
    package(tmp_path, "datasets", "import ctypes; ctypes.string_at(0)")
    package(tmp_path, "accelerate", "", version=None)
    package(tmp_path, "triton", "raise ImportError('libcuda.so.1:\\n  cannot open')")
    package(tmp_path, "transformers", "print('hello'); import os; os.write(1, b'{}')", version="5.99")
    monkeypatch.syspath_prepend(tmp_path)
    names = ["peft", "trl", "datasets", "accelerate", "triton", "transformers"]
    values, problems, printed = examine.ask([f"package {name}" for name in names], None)
    told = {row["part"].removeprefix("package "): row["problem"] for row in problems}
    assert list(told) == names[:-1]
    assert told["peft"] == "ZeroDivisionError: division by zero"
    assert told["trl"] == "it ended the process with exit code 1: no licence."
    assert told["datasets"] == "it crashed: the process died of SIGSEGV."
    assert told["accelerate"].startswith("its metadata names no version")
    assert told["triton"] == "ImportError: libcuda.so.1: cannot open"
    assert values["package transformers"] == "5.99"
    assert "hello" in printed


def test_a_package_that_hangs_is_stopped(tmp_path, monkeypatch):
    package(tmp_path, "peft", "import time; time.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    assert problems_of("peft", patience=8.0) == {"peft": "no answer in 8 s; it was stopped."}


def test_a_needed_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(checks.util, "find_spec", lambda name: None)
    assert checks.attempt(checks.parts()["package numba"])[1] == (
        "it is not installed, and selectune needs it: pip install numba"
    )
    assert checks.attempt(checks.parts()["package trl"]) == (checks.ABSENT, None)


def test_no_process_can_be_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    found = CliRunner().invoke(app, ["doctor"])
    assert found.exit_code == 1
    assert "no process could be started: " in found.stdout
    assert fits(found.stdout)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OMP_NUM_THREADS", "abc", "it is 'abc', which is no number of threads."),
        ("MKL_NUM_THREADS", "0", "no number of threads"),
        ("NUMBA_NUM_THREADS", "-1", "no number of threads"),
        ("NUMBA_CACHE_DIR", "{file}/cache", "cannot be a folder"),
        ("TRITON_CACHE_DIR", "/proc/self/none", "nothing can be written"),
        ("TMPDIR", "{folder}/none", "does not exist"),
        ("HF_HOME", "{file}", "is not a folder"),
        ("SELECTUNE_DATA", "{folder}/none", "does not exist"),
    ],
)
def test_variables(tmp_path, monkeypatch, name, value, said):
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    part = checks.parts()[f"variable {name}"]
    monkeypatch.setenv(name, value.format(file=file, folder=tmp_path))
    assert said in (checks.attempt(part)[1] or "")
    monkeypatch.setenv(name, "4,2" if name == "OMP_NUM_THREADS" else "2" if "THREADS" in name else str(tmp_path))
    assert checks.attempt(part)[1] is None
    monkeypatch.delenv(name)
    assert checks.attempt(part) == (None, None)


def test_a_weird_environment_as_a_program(tmp_path):
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    weird = {"OMP_NUM_THREADS": "abc", "NUMBA_CACHE_DIR": f"{file}/cache", "TMPDIR": f"{tmp_path}/none"}
    run = subprocess.run(
        [sys.executable, "-m", "selectune", "doctor"], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, **weird, "SELECTUNE_BACKEND": "fortran", "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert run.returncode == 1, run.stdout
    for name in weird:
        assert f"problem    variable {name}: " in run.stdout
    assert "problem    backend: ConfigError: SELECTUNE_BACKEND=fortran is no backend." in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
    assert fits(run.stdout)


def test_memory_that_cannot_be_read(monkeypatch):
    def broken():
        raise IndexError("a line of /proc/meminfo without a number")

    monkeypatch.setattr(meter, "available", broken)
    assert checks.attempt(checks.parts()["devices"])[1] == "IndexError: a line of /proc/meminfo without a number"


def test_an_engine_that_is_ill(monkeypatch):
    def ill(*args, **kwargs):
        raise st.errors.SelectuneError("the weights moved")

    monkeypatch.setattr(st, "attach", ill)
    assert checks.attempt(checks.parts()["self-check"])[1] == "SelectuneError: the weights moved"


def test_a_problem_is_told_and_the_exit_code_is_1(monkeypatch):
    row = {"part": "self-check", "problem": "the weights\nmoved " + "far " * 50}
    monkeypatch.setattr(examine, "ask", lambda *args: ({}, [row], ""))
    found = CliRunner().invoke(app, ["doctor"])
    assert found.exit_code == 1
    assert "has 1 problem here.\nproblem    self-check: the weights moved far far" in found.stdout
    assert fits(found.stdout)
    assert "far far far \n" in CliRunner().invoke(app, ["doctor", "--verbose"]).stdout
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["problems"] == [row]


def test_many_problems_fit_one_screen(monkeypatch):
    rows = [{"part": f"package p{n}", "problem": "x" * 200} for n in range(60)]
    packages = {f"package {name}": "1.2.3+" + "y" * 30 for name in (*checks.NEEDED, *checks.OPTIONAL)}
    monkeypatch.setattr(examine, "ask", lambda *args: (packages, rows, ""))
    text = examine.page(examine.examine())
    assert fits(text)
    assert "has 60 problems here." in text
    assert "more\n" in text


def test_a_doctor_that_is_ill_himself(monkeypatch):
    def ill(*args):
        raise KeyError("what")

    monkeypatch.setattr(examine, "examine", ill)
    found = CliRunner().invoke(app, ["doctor"])
    assert (found.exit_code, found.stdout, found.stderr) == (1, "", "error: doctor: KeyError: 'what'\n")


# -- a model before it is tuned


class Odd(nn.Module):
    """Tied, frozen, complex and whole-number parameters beside ordinary ones, in two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4, padding_idx=0)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.table.weight
        self.narrow = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
        self.cold = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.waves = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        self.codes = nn.Parameter(torch.zeros(5, dtype=torch.int8), requires_grad=False)


def test_what_is_in_scope_tied_and_left_out():
    found = candidate.inspect(Odd())
    assert found["in_scope"]["dtypes"] == {"float32": 32, "bfloat16": 16}
    assert found["in_scope"]["summary"] == "2 tensors: 32 float32, 16 bfloat16"
    assert found["in_scope"]["tensors"]["table.weight"] == {"shape": [8, 4], "padding": 0}  # the head trains that row
    assert found["tied"]["table.weight"] == ["head.weight"]
    assert found["left_out"]["tensors"] == {
        "cold": "frozen",
        "waves": "complex",
        "codes": "quantised or whole numbers, int8",
    }
    assert found["attach"] == {"works": True, "summary": "works and leaves no trace"}


def test_a_model_without_anything_to_train():
    model = nn.Linear(2, 2).requires_grad_(False)
    found = candidate.inspect(model)
    assert found["in_scope"]["summary"] == "nothing"
    assert found["left_out"]["summary"] == "2 frozen (weight, bias)"
    assert found["attach"]["works"] is False
    assert "leaves no trainable floating tensor" in found["attach"]["summary"]


def test_a_model_that_cannot_be_attached_to():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(1, 2).expand(2, 2))
    found = candidate.inspect(model)
    assert found["attach"]["works"] is False
    assert "cannot be trained in place" in found["attach"]["summary"]


def test_a_model_that_attach_refuses_is_a_problem(monkeypatch):
    looked = candidate.inspect(nn.Linear(2, 2).requires_grad_(False))
    monkeypatch.setattr(examine, "ask", lambda *args: ({"model x": looked}, [], ""))
    found = CliRunner().invoke(app, ["doctor", "--model", "x"])
    assert found.exit_code == 1
    assert "problem    model x: attach does not work: ScopeError: The scope include=" in found.stdout
    assert "left out   2 frozen (weight, bias)" in found.stdout
    assert fits(found.stdout)


def test_a_trace_is_seen(monkeypatch):
    model = nn.Linear(64, 64)  # more than are selected: detach writes those back

    def spoil(tuner, model):
        with torch.no_grad():
            model.weight.mul_(2)
        return ""

    monkeypatch.setattr(candidate, "uses", spoil)
    assert "After attach and detach, weight are not what they were" in candidate.inspect(model)["attach"]["summary"]


def test_a_model_by_its_folder(tmp_path, tiny):
    values, problems, _ = examine.ask([f"model {tiny}"], str(tiny))
    assert not problems
    found = values[f"model {tiny}"]
    assert found["class"] == "BertModel"
    assert (
        found["attach"]["summary"]
        == "works and leaves no trace; the gradients of 39 tensors are those of plain autograd"
    )
    text = "\n".join(examine.told({"path": str(tiny), **found}))
    assert "in scope   " in text
    assert "left out   nothing" in text


def test_a_model_that_is_not_there():
    value, problem = checks.attempt(checks.parts("./nowhere")["model ./nowhere"])
    assert value is None
    assert (problem or "").startswith("ModelError: The model folder './nowhere' does not exist.")


def test_a_model_whose_weights_are_damaged(tmp_path):
    folder = make_model(tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert (checks.attempt(checks.parts(str(folder))[f"model {folder}"])[1] or "").startswith("ModelError: ")
