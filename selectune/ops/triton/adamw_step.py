"""One AdamW step over the vector on CUDA."""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch
from torch import Tensor

from selectune import bits
from selectune.ops import reference
from selectune.ops.triton.language import accumulator, block, jit, tl, triton


def adamw_step(
    values: Tensor, gradient: Tensor, m: Tensor, v: Tensor, ages: Tensor | None, step: int,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """`reference.adamw_step` in one pass over the four vectors."""
    if not all(part.is_contiguous() for part in (values, gradient, m, v)):
        reference.adamw_step(values, gradient, m, v, ages, step, lr, beta1, beta2, eps, weight_decay)
        return
    wide = bits.wide(values.dtype)
    # the numbers are passed as a tensor, since a kernel argument would be rounded to float32
    numbers = [1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps, lr, 1 - beta1**step, (1 - beta2**step) ** 0.5]
    real = torch.tensor(numbers, dtype=wide).to(values.device)
    tables = [1 - reference.powers(b, step, torch.float64) for b in (beta1, beta2)] if ages is not None else [real] * 2
    first, second = (table.to(values.device, wide) for table in tables)
    size = block(1024, 64)
    adamw_step_kernel[(triton.cdiv(values.numel(), size),)](
        values, gradient, m, v, values if ages is None else ages, real, first, second, values.numel(),
        first.numel() - 1, second.numel() - 1, AGED=ages is not None, SIZE=size, SUM=accumulator(values.dtype),
    )  # fmt: skip


@jit
def adamw_step_kernel(
    values, gradient, m, v, ages, real, first, second, n, first_end, second_end,
    AGED: tl.constexpr, SIZE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = slot < n
    value = tl.load(values + slot, mask=inside, other=0.0).to(SUM)
    g = tl.load(gradient + slot, mask=inside, other=0.0).to(SUM)
    old_m = tl.load(m + slot, mask=inside, other=0.0).to(SUM)
    old_v = tl.load(v + slot, mask=inside, other=0.0).to(SUM)
    keep, rest1, keep2, rest2 = tl.load(real), tl.load(real + 1), tl.load(real + 2), tl.load(real + 3)
    eps, lr, correction, root = tl.load(real + 4), tl.load(real + 5), tl.load(real + 6), tl.load(real + 7)
    awake = inside
    if AGED:
        age = tl.load(ages + slot, mask=inside, other=0)
        awake = inside & ((age > 0) | (g != 0.0))
        age = age + 1
        tl.store(ages + slot, age, mask=awake)
        correction = tl.load(first + tl.minimum(age, first_end), mask=inside, other=1.0)
        root = tl.sqrt(tl.load(second + tl.minimum(age, second_end), mask=inside, other=1.0))
    new_m = old_m + rest1 * (g - old_m)
    new_v = old_v * keep2 + rest2 * g * g
    moved = value * keep - lr / correction * new_m / (tl.sqrt(new_v) / root + eps)
    tl.store(values + slot, moved.to(values.dtype.element_ty), mask=awake)
    tl.store(m + slot, new_m.to(m.dtype.element_ty), mask=awake)
    tl.store(v + slot, new_v.to(v.dtype.element_ty), mask=awake)
