"""Bounds on a weight gradient on the CPU: tensors in, tensors out; the loops are in `bound_loops`."""

from __future__ import annotations

import torch
from torch import Tensor

from selectune.ops.cpu.compiled import loop, module
from selectune.ops.cpu.kernels import STORED
from selectune.ops.cpu.threads import launch
from selectune.ops.scratch import scratch


def measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest size of a number and the sum of squares of every column of (t, n) float32: (n,), (n,)."""
    t, n = x.shape
    top, square = torch.empty(n), torch.empty(n)
    launch(
        loop("bound_loops", "measure", None),
        [t, n, x.data_ptr(), x.stride(0), top.data_ptr(), square.data_ptr(), _width(n)],
        -(-n // _width(n)),
    )
    return top, square


def rounded(x: Tensor, top: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Every column of (t, n) as integers in [-127, 127] times a scale, and the sum of squares of what that loses."""
    t, n = x.shape
    q, scale, lost = scratch(f"rounded {name}", (t, n), torch.int8), torch.empty(n), torch.empty(n)
    launch(
        loop("bound_loops", "round_columns", None),
        [t, n, x.data_ptr(), x.stride(0), top.data_ptr(), q.data_ptr(), scale.data_ptr(), lost.data_ptr(), _width(n)],
        -(-n // _width(n)),
    )
    return q, scale, lost


def _width(n: int) -> int:
    """Columns of a block: wide ones read faster, and each thread should have one. The numbers do not depend on it."""
    return max(module("bound_loops").COLUMNS, -(-n // torch.get_num_threads()))


def sift(
    products: Tensor,  # (o, i) int32
    weight: Tensor,  # (o, i)
    rows: Tensor,  # (3, o) float32: scale, norm, lost
    columns: Tensor,  # (3, i) float32: the same
    needed: Tensor,  # (bins,) float32: what |g| must reach, by the leading bits of |w|
    floor: float,  # the least that any of the weights asks of |g|
    room: int,
) -> Tensor | None:  # (m,) int64 ascending
    """Flat positions whose bound on |g| reaches what their weights ask for; None if there are more than `room`."""
    o, i = products.shape
    out, found, least = torch.empty(room, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.tensor(floor)
    launch(
        loop("bound_loops", "sift", None),
        [o, i, products.data_ptr(), weight.data_ptr(), STORED[weight.dtype], rows.data_ptr(), columns.data_ptr(),
         needed.data_ptr(), least.data_ptr(), room, out.data_ptr(), found.data_ptr()],
        -(-o // module("bound_loops").ROWS),
    )  # fmt: skip
    count = int(found)
    return None if count > room else torch.sort(out[:count]).values


def reach(
    products: Tensor, weight: Tensor, rows: Tensor, columns: Tensor, worth: Tensor, keep: float
) -> Tensor:  # (groups,) float32
    """As `sift`: the best lower bound on a score among every few entries.

    `worth` (bins,) float32 is the least that a weight multiplies |g| by; `keep` < 1 leaves room for rounding.
    """
    o, i = products.shape
    out, share = torch.empty(o * -(-i // module("bound_loops").SPREAD)), torch.tensor(keep)
    launch(
        loop("bound_loops", "reach", None),
        [o, i, products.data_ptr(), weight.data_ptr(), STORED[weight.dtype], rows.data_ptr(), columns.data_ptr(),
         worth.data_ptr(), share.data_ptr(), out.data_ptr()],
        -(-o // module("bound_loops").ROWS),
    )  # fmt: skip
    return out


def summed(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Entries (m,) of dy^T x, each summed in float64 in the order of the tokens; float32 operands, rows contiguous."""
    rows, cols = rows.int().contiguous(), cols.int().contiguous()
    out = torch.empty(rows.numel(), dtype=torch.float64)
    launch(
        loop("bound_loops", "sum_exactly", None),
        [dy.shape[0], rows.numel(), dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), rows.data_ptr(),
         cols.data_ptr(), out.data_ptr()],
        -(-rows.numel() // module("bound_loops").ENTRIES),
    )  # fmt: skip
    return out
