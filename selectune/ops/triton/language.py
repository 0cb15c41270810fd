"""Triton if it is installed, or else a stand-in, so that these files can always be imported."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

AVAILABLE = importlib.util.find_spec("triton") is not None

triton: Any = importlib.import_module("triton") if AVAILABLE else None
tl: Any = importlib.import_module("triton.language") if AVAILABLE else None


def jit(function: Any) -> Any:
    """`triton.jit`, or the function unchanged if Triton is not installed."""
    return triton.jit(function) if AVAILABLE else function


def interpreted() -> bool:
    """Whether kernels run on the CPU, operation by operation (TRITON_INTERPRET=1), where blocks should be small."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def block(compiled: int, small: int) -> int:
    """A block size for the GPU, or one for the interpreter."""
    return small if interpreted() else compiled


def accumulator(dtype: torch.dtype) -> Any:
    """Triton's dtype for sums of operands of this dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32
