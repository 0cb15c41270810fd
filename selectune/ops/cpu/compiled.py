"""Compiled loops: made at first use, and cached on disk where that is allowed."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger("selectune")


@functools.cache
def module(name: str) -> Any:
    """A file of loops, which needs numba."""
    return importlib.import_module(f"selectune.ops.cpu.{name}")


@functools.cache
def loop(file: str, name: str, dtype: torch.dtype | None) -> int:
    """The address of a compiled loop; `dtype` None: of one for float32 only."""
    numba = importlib.import_module("numba")
    function = getattr(module(file), name if dtype is None else f"{name}_{str(dtype).removeprefix('torch.')}")
    signature = numba.types.void(numba.types.voidptr)
    _kept.append(cached(functools.partial(numba.cfunc, signature), function))
    return _kept[-1].address


_kept: list[Any] = []  # compiled code lives as long as what was compiled


def cached(decorator: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """Compiled and cached on disk, or compiled anew in every process where no folder can be written."""
    try:
        return decorator(cache=True)(function)
    except RuntimeError as error:
        log.info("numba cannot cache compiled loops here (%s): they are compiled in every process.", error)
        return decorator(cache=False)(function)
