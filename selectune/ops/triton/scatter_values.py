"""weight.view(-1)[flat] = values[slots] on CUDA, cast to the weight's dtype."""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch
from torch import Tensor

from selectune.ops import reference
from selectune.ops.triton.language import block, jit, tl, triton


def scatter_values(weight: Tensor, flat: Tensor, values: Tensor, slots: Tensor) -> None:
    """`reference.scatter_values` in one pass; for strided weights it calls the reference."""
    if not weight.is_contiguous() or values.device != weight.device:
        reference.scatter_values(weight, flat, values, slots)
        return
    size = block(1024, 64)
    scatter_values_kernel[(triton.cdiv(flat.numel(), size),)](
        weight, flat.contiguous(), values.contiguous(), slots.contiguous(), flat.numel(),
        BFLOAT16=weight.dtype == torch.bfloat16, SIZE=size,
    )  # fmt: skip


@jit
def scatter_values_kernel(weight, flat, values, slots, k, BFLOAT16: tl.constexpr, SIZE: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = entry < k
    at = tl.load(flat + entry, mask=inside, other=0).to(tl.int64)
    slot = tl.load(slots + entry, mask=inside, other=0).to(tl.int64)
    value = tl.load(values + slot, mask=inside, other=0.0)
    if BFLOAT16:  # rounded by hand, since the interpreter's cast loses the carry
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        value = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        value = value.to(weight.dtype.element_ty)
    tl.store(weight + at, value, mask=inside)
