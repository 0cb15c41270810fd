"""Triton's kernels on the CPU, under its interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter():
    """In a process of its own: the interpreter is chosen when the kernels are imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "SELECTUNE_BACKEND": "triton"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         "-W", "ignore::RuntimeWarning", "-W", "ignore:Conversion of an array:DeprecationWarning", "interpreted.py"],
        capture_output=True, text=True, env=env, cwd=HERE, timeout=500, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_product_filter_compiles_for_a_gpu_that_is_not_here():
    """To machine code of compute capability 9.0, in a process of its own, as the interpreter knows fewer limits."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "compiled.py"], capture_output=True, text=True, cwd=HERE, timeout=300,
        check=False, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["fp32", "bf16", "fp16"]


def test_kernel_modules_import_without_triton():
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else real(name, *a)\n"
        "import selectune.ops.triton as kernels; from selectune.ops.triton import language\n"
        "assert not language.AVAILABLE and callable(kernels.sampled_matmul)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
