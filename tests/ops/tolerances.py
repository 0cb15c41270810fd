"""How far an op may be from its reference: one table for every backend, by op and dtype of the operands.

Relative to the size of the terms that were summed (`limit`), so cancellation is no excuse and no failure.
"""

from __future__ import annotations

import torch

TOLERANCE = {
    # sums in float32, in another order than the reference; half operands are widened first
    ("sampled_matmul", torch.float32): 2e-6,
    ("sampled_matmul", torch.bfloat16): 2e-6,
    ("sampled_matmul", torch.float16): 2e-6,
    ("sampled_matmul", torch.float64): 4e-15,
    # elementwise: the same bits for exp 0, 1 and 2; a power is right to some units in the last place
    ("score_filter, any power", torch.float32): 1e-6,
    ("score_filter, any power", torch.float64): 1e-14,
    # per step; the order of operations differs
    ("adamw_step", torch.float32): 1e-6,
    ("adamw_step", torch.float64): 1e-14,
}


def close(op: str, got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, size: torch.Tensor | float) -> None:
    """Fails where `got` is further from `wanted` than the table allows for terms of this size."""
    assert got.shape == wanted.shape
    if got.numel() == 0:
        return
    bound = TOLERANCE[op, dtype] * torch.as_tensor(size, dtype=torch.float64).clamp(min=1e-30)
    worst = ((got.double() - wanted.double()).abs() / bound).max()
    assert worst <= 1, f"{op}: {float(worst):.2f} times what {dtype} allows"
