"""Every op in plain torch: the truth the kernels are tested against.

Letters: t tokens, o outputs, i inputs of a linear layer, k entries of the support.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 24  # scalars of a gathered product held at once

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same width, flat: equal bits, not equal numbers."""
    flat = tensor.detach().reshape(-1)
    return flat.view(_INTEGERS[min(8, tensor.element_size())])


def checksum(tensor: Tensor) -> int:
    """The sum of all bits read as integers, modulo 2^64: any single changed scalar changes it."""
    return int(bits(tensor).sum(dtype=torch.int64))


def gather_entries(tensor: Tensor, flat: Tensor) -> Tensor:
    """Entries of `tensor` at flat row-major indices (k,), without a copy of a strided tensor."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)[flat]
    return tensor[torch.unravel_index(flat, tensor.shape)]


def scatter_entries(tensor: Tensor, flat: Tensor, values: Tensor) -> None:
    """Writes `values` (k,) at flat row-major indices (k,), unique, into `tensor` itself."""
    tensor = tensor.detach()
    if flat.numel() == 0:
        return
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, flat, values.to(tensor.dtype))
    else:  # reshape(-1) would write into a copy
        tensor.index_put_(torch.unravel_index(flat, tensor.shape), values.to(tensor.dtype))


def sampled_matmul(
    dy: Tensor,  # (t, o)
    x: Tensor,  # (t, i)
    rows: Tensor,  # (k,) int64 into o
    cols: Tensor,  # (k,) int64 into i
) -> Tensor:  # (k,) float32, or float64 for float64 operands
    """The gradient of a linear weight at its support: g_k = sum_t dy[t, rows_k] x[t, cols_k]."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    out = torch.empty(rows.numel(), dtype=wide, device=dy.device)
    step = max(1, _CHUNK // max(1, dy.shape[0]))
    for start in range(0, rows.numel(), step):
        part = slice(start, start + step)
        product = dy[:, rows[part]].to(wide) * x[:, cols[part]].to(wide)
        torch.sum(product, 0, out=out[part])
    return out


def sampled_rows(
    dy: Tensor,  # (t, d) gradient of the looked-up rows
    ids: Tensor,  # (t,) int64, the row each token looked up; -1 = none
    rows: Tensor,  # (k,) int64
    cols: Tensor,  # (k,) int64
) -> Tensor:  # (k,)
    """The gradient of an embedding at its support: g_k = sum over t with ids_t = rows_k of dy[t, cols_k]."""
    occurring, block = row_sums(dy, ids)
    if occurring.numel() == 0:
        return torch.zeros(rows.shape, dtype=block.dtype, device=dy.device)
    at = torch.searchsorted(occurring, rows).clamp_(max=occurring.numel() - 1)
    found = occurring[at] == rows
    return torch.where(found, block[at, cols], block.new_zeros(()))


def row_sums(dy: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that occur (u,), ascending, and their summed gradients (u, d): all that is not zero."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    occurring, inverse = torch.unique(ids, return_inverse=True)
    block = torch.zeros(occurring.numel(), dy.shape[1], dtype=wide, device=dy.device)
    block.index_add_(0, inverse, dy.to(wide))
    if occurring.numel() and int(occurring[0]) < 0:
        occurring, block = occurring[1:], block[1:]
    return occurring, block
