"""Tensors as bits: this package reads, compares and writes weights only by these functions.

All of them use an integer view, so that -0.0, NaN payloads and every dtype stay exact.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = frozenset(_INTEGER.values())

FLOATS: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Dtypes that a patch may have, by their names in the file."""

DTYPES: dict[str, torch.dtype] = FLOATS | {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "C64": torch.complex64,
}
"""Dtypes that a dense tensor may have."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name in the file; dtypes outside the format have torch's name.

    >>> dtype_name(torch.bfloat16)
    'BF16'
    """
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def int_view(tensor: Tensor) -> Tensor:
    """The same memory, with any strides, as integers of the same width (not for 16-byte dtypes)."""
    return tensor.detach().view(_INTEGER[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(flat_view(a).cpu(), flat_view(b).cpu())


def flat_view(tensor: Tensor) -> Tensor:
    """The entries as flat integers (n,) of the same width, with the same bits; a copy if the tensor is strided."""
    flat = tensor.detach().reshape(-1)
    return flat.view(_INTEGER[min(8, tensor.element_size())])


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor's sums, scores and trained values: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_entries(tensor: Tensor, flat: Tensor) -> Tensor:
    """Entries of `tensor` at flat row-major indices (k,), on its device, without a copy of a strided tensor."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)[flat]
    return tensor[torch.unravel_index(flat, tensor.shape)]


def scatter_entries(tensor: Tensor, flat: Tensor, values: Tensor) -> None:
    """Write `values` (k,) at unique flat row-major indices (k,) into `tensor` itself, whatever its strides."""
    tensor = tensor.detach()
    if flat.numel() == 0:
        return
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, flat, values.to(tensor.dtype))
    else:  # reshape(-1) would write into a copy
        tensor.index_put_(torch.unravel_index(flat, tensor.shape), values.to(tensor.dtype))


class Scattered(Protocol):
    """What stands for a tensor of zeros but for some entries, as values beside a quantised weight do."""

    def gather(self, flat: Tensor) -> Tensor: ...

    def scatter(self, flat: Tensor, values: Tensor) -> None: ...


def gather(tensor: Tensor | Scattered, indices: Tensor) -> Tensor:
    """Copy the entries at flat row-major `indices` `(n,)` to the CPU, in the tensor's dtype `(n,)`."""
    if not isinstance(tensor, Tensor):
        return tensor.gather(indices).cpu()
    return gather_entries(int_view(tensor), indices.to(tensor.device)).cpu().view(tensor.dtype)


def scatter(tensor: Tensor | Scattered, indices: Tensor, values: Tensor) -> None:
    """Write `values` `(n,)`, bit by bit, at flat row-major `indices` `(n,)`, whatever the strides."""
    if not isinstance(tensor, Tensor):
        tensor.scatter(indices, values)
        return
    plain = tensor.dim() == 1 and tensor.dtype in _PLAIN and tensor.dtype == values.dtype
    if plain and tensor.device == indices.device == values.device:  # as a prepared switch calls it: half the time
        tensor.index_copy_(0, indices, values)
        return
    scatter_entries(int_view(tensor), indices.to(tensor.device), int_view(values).to(tensor.device))


def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Write a whole tensor of the same shape and dtype, bit by bit, whatever the strides."""
    int_view(tensor).copy_(int_view(values))


def raw(tensor: Tensor) -> np.ndarray:
    """The tensor's little-endian bits in row-major order, as a flat integer array (no copy if possible)."""
    flat = int_view(tensor).reshape(-1).cpu().contiguous().numpy()
    return flat.astype(flat.dtype.newbyteorder("<"), copy=False)


def first_non_finite(tensor: Tensor) -> int | None:
    """Flat position of the first NaN or infinity, or None."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return None
    # torch has no isfinite for float8; widening keeps NaN and infinity
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    bad = ~torch.isfinite(wide.reshape(-1))
    return int(bad.int().argmax()) if bool(bad.any()) else None


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values in another float dtype, rounded once, to nearest, ties to even.

    torch converts to float32 first and so rounds twice for narrow dtypes. Here the first step rounds to odd, which
    preserves the side of a tie (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved
    algorithms using rounding to odd", theorem 3.1).

    >>> middle = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)  # just above the tie of two bfloat16
    >>> middle.to(torch.bfloat16).item(), round_once(middle, torch.bfloat16).item()
    (1.0, 1.0078125)
    """
    if dtype.itemsize >= 4:
        return values.to(dtype)
    near = values.float()
    error = values - near.double()
    even = (error != 0) & torch.isfinite(near) & (int_view(near) & 1 == 0)
    toward = torch.where(error > 0, torch.inf, -torch.inf).float()
    return torch.where(even, torch.nextafter(near, toward), near).to(dtype)
