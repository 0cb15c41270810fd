"""Memory that calls reuse: one block for each purpose, thread and device, kept until `release`.

On the CPU the blocks are outside the C library's heap. A large tensor that is made and freed at every layer either
faults in all its pages each time or leaves holes between the activations, which then stay resident. Both cost more than
the work itself.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from selectune.internals import dispatch_modes

_local = threading.local()


def scratch(purpose: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A CPU tensor of undefined content, valid until this thread asks for the same purpose again.

    >>> scratch("doctest", (2, 3), torch.float32).shape
    torch.Size([2, 3])
    """
    count = math.prod(shape)
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    size = count * dtype.itemsize
    blocks = _blocks()
    block = blocks.get(purpose)
    if block is None or block.numel() < size:
        blocks.pop(purpose, None)
        block = blocks[purpose] = _block(size)
    return block[:size].view(dtype).view(tuple(shape))


def release() -> None:
    """Free this thread's blocks; a block that is still in use is freed afterwards."""
    _blocks().clear()


def _blocks() -> dict[str, Tensor]:
    if not hasattr(_local, "blocks"):
        _local.blocks = {}
    return _local.blocks


def _block(size: int) -> Tensor:
    if dispatch_modes():  # a mode counts memory or does without: it has to see a tensor of torch's own
        return torch.empty(size, dtype=torch.uint8)
    return torch.frombuffer(_pages(size), dtype=torch.uint8)


def _pages(size: int) -> mmap.mmap:
    """Private pages of this process."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
