"""The declaration of every op: its schema, its shapes without data, its gradient, the checks of its arguments.

torch.compile, fake tensors and the profiler see `torch.ops.selectune.<name>`. `backend` chooses the implementation;
`reference` defines the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selectune import bits, internals
from selectune.errors import ConfigError
from selectune.ops import backend

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

SCHEMAS = {
    "sampled_matmul": "(Tensor dy, Tensor x, Tensor rows, Tensor cols) -> Tensor",
    "score_filter": "(Tensor weight, Tensor gradient, float exp, float eps, float cutoff) -> (Tensor, Tensor, Tensor)",
    "small_filter": "(Tensor weight, float cutoff) -> (Tensor, Tensor, Tensor)",
    "scatter_values": "(Tensor(a!) weight, Tensor flat, Tensor values, Tensor slots) -> ()",
    "adamw_step": (
        "(Tensor(a!) values, Tensor gradient, Tensor(b!) m, Tensor(c!) v, Tensor(d!)? ages, int step, float lr, "
        "float beta1, float beta2, float eps, float weight_decay) -> ()"
    ),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"selectune::{_name}", _schema)
    for _device in ("cpu", "cuda"):
        torch.library.impl(f"selectune::{_name}", _device, backend.implementation(_name, _device))


# -- shapes without data


@torch.library.register_fake("selectune::sampled_matmul")
def _(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    return dy.new_empty(rows.shape, dtype=bits.wide(dy.dtype))


@torch.library.register_fake("selectune::score_filter")
def _(weight: Tensor, gradient: Tensor, exp: float, eps: float, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    m = torch.library.get_ctx().new_dynamic_size()
    return (
        weight.new_empty(m, dtype=torch.int64),
        weight.new_empty(m, dtype=bits.wide(weight.dtype)),
        weight.new_empty((), dtype=torch.bool),
    )


@torch.library.register_fake("selectune::small_filter")
def _(weight: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    m = torch.library.get_ctx().new_dynamic_size()
    return (
        weight.new_empty(m, dtype=torch.int64),
        weight.new_empty(m, dtype=bits.wide(weight.dtype)),
        weight.new_empty((), dtype=torch.bool),
    )


@torch.library.register_fake("selectune::scatter_values")
def _(weight: Tensor, flat: Tensor, values: Tensor, slots: Tensor) -> None:
    return None


@torch.library.register_fake("selectune::adamw_step")
def _(values: Tensor, gradient: Tensor, m: Tensor, v: Tensor, ages: Tensor | None, *numbers: float) -> None:
    return None


# -- the gradient of the sampled product: one sparse matrix times each operand


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, rows, cols = ctx.saved_tensors
    entries = torch.zeros(dy.shape[1], x.shape[1], dtype=grad.dtype, device=grad.device)
    entries.index_put_((rows.long(), cols.long()), grad, accumulate=True)
    to_dy = (x.to(grad.dtype) @ entries.mT).to(dy.dtype) if ctx.needs_input_grad[0] else None
    to_x = (dy.to(grad.dtype) @ entries).to(x.dtype) if ctx.needs_input_grad[1] else None
    return to_dy, to_x, None, None


torch.library.register_autograd("selectune::sampled_matmul", _differentiate, setup_context=_remember)


# -- what callers use: checked arguments


def sampled_matmul(
    dy: Tensor,  # (t, o)
    x: Tensor,  # (t, i)
    rows: Tensor,  # (k,) int32 or int64 into o; ascending is fastest
    cols: Tensor,  # (k,) int32 or int64 into i
) -> Tensor:  # (k,) float32, or float64 for float64 operands
    """g_k = sum_t dy[t, rows_k] x[t, cols_k]: the gradient of a linear weight at its support only.

    Operands are float32, float64, bfloat16 or float16; sums are in float32 (float64 for float64). It is differentiable.
    Raises ConfigError for shapes or dtypes that do not fit.

    >>> import torch
    >>> dy, x = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    >>> sampled_matmul(dy, x, torch.tensor([0, 1]), torch.tensor([2, 0])).tolist()
    [5.0, 6.0]
    """
    _check(dy.dim() == 2 and x.dim() == 2 and dy.shape[0] == x.shape[0],
           "sampled_matmul", "dy (t, o) and x (t, i) with the same t", dy, x)  # fmt: skip
    _check(rows.dim() == 1 and rows.shape == cols.shape, "sampled_matmul", "rows (k,) and cols (k,)", rows, cols)
    _check_indices("sampled_matmul", rows, cols)
    _check_floats("sampled_matmul", dy, x)
    if dy.dtype != x.dtype:
        common = torch.promote_types(dy.dtype, x.dtype)
        dy, x = dy.to(common), x.to(common)
    return _call("sampled_matmul", dy, x, rows, cols)


def score_filter(
    weight: Tensor,  # (n,) flat
    gradient: Tensor,  # (n,) flat
    exp: float,
    eps: float,
    cutoff: float,
) -> tuple[Tensor, Tensor, Tensor]:  # (m,) int64 ascending, (m,) float32 or float64, () bool
    """Entries with |g| / (|w| + eps)^exp >= cutoff and > 0, their scores, and whether every score is finite.

    It makes one pass over weight and gradient, whose dtypes may differ. Scores are float32 (float64 for a float64
    weight), with the same bits on every backend for exp 0, 1 and 2.

    >>> import torch
    >>> w, g = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([3.0, -8.0, 0.0])
    >>> [part.tolist() for part in score_filter(w, g, exp=2.0, eps=1.0, cutoff=2.5)]
    [[0], [3.0], True]
    """
    _check(weight.dim() == 1 and weight.shape == gradient.shape,
           "score_filter", "weight (n,) and gradient (n,)", weight, gradient)  # fmt: skip
    _check_floats("score_filter", weight, gradient)
    _check_cutoff("score_filter", cutoff)
    return _call("score_filter", weight, gradient, float(exp), float(eps), float(cutoff))


def small_filter(weight: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of a flat weight with -|w| >= cutoff (m,) ascending, their scores (m,), and whether all are finite.

    >>> import torch
    >>> [part.tolist() for part in small_filter(torch.tensor([0.5, -3.0, 1.0]), cutoff=-1.0)]
    [[0, 2], [-0.5, -1.0], True]
    """
    _check(weight.dim() == 1, "small_filter", "a flat weight (n,)", weight)
    _check_floats("small_filter", weight)
    _check_cutoff("small_filter", cutoff)
    return _call("small_filter", weight, float(cutoff))


def scatter_values(
    weight: Tensor,  # any shape, any strides
    flat: Tensor,  # (k,) int64, row-major, unique
    values: Tensor,  # (b,)
    slots: Tensor,  # (k,) int64 into values
) -> None:
    """weight.view(-1)[flat] = values[slots], rounded to the weight's dtype (to nearest, ties to even), in place.

    >>> import torch
    >>> weight = torch.zeros(2, 2)
    >>> scatter_values(weight, torch.tensor([3]), torch.tensor([5.0, 7.0]), torch.tensor([1]))
    >>> weight.tolist()
    [[0.0, 0.0], [0.0, 7.0]]
    """
    _check(flat.dim() == 1 and flat.shape == slots.shape and values.dim() == 1,
           "scatter_values", "flat (k,), values (b,) and slots (k,)", flat, values, slots)  # fmt: skip
    _check_indices("scatter_values", flat, slots)
    if flat.numel():
        torch.ops.selectune.scatter_values(weight.detach(), flat, values.detach(), slots)


def scatter_many(weights: Sequence[Tensor], flats: Sequence[Tensor], values: Tensor, slots: Sequence[Tensor]) -> None:
    """`scatter_values` of one vector into many weights, in one launch if the weights allow it.

    >>> import torch
    >>> a, b = torch.zeros(2), torch.zeros(3)
    >>> one = torch.tensor([1])
    >>> scatter_many([a, b], [one, one], torch.tensor([5.0, 7.0]), [torch.tensor([0]), one])
    >>> a.tolist(), b.tolist()
    ([0.0, 5.0], [0.0, 7.0, 0.0])
    """
    backend.scatter_many(scatter_values, weights, flats, values, slots)


def adamw_step(
    values: Tensor, gradient: Tensor, m: Tensor, v: Tensor, ages: Tensor | None, *, step: int,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """One AdamW step in place, in one pass over four equally long vectors; see `reference.adamw_step`."""
    parts = [values, gradient, m, v, *([] if ages is None else [ages])]
    _check(len({part.shape for part in parts}) == 1, "adamw_step", "equally long vectors", *parts)
    _check(ages is None or ages.dtype == torch.int32, "adamw_step", "ages int32", *parts[4:])
    _check(step >= 1, "adamw_step", "a step counted from 1")
    if values.numel():
        torch.ops.selectune.adamw_step(values, gradient, m, v, ages, step, lr, *betas, eps, weight_decay)


def _call(op: str, first: Tensor, *rest: Any) -> Any:
    """Call the op, directly from its backend if torch's dispatcher would do nothing."""
    if _nobody_watches(first, *(part for part in rest if isinstance(part, Tensor))):
        return backend.run(op, first.device.type, first, *rest)
    return getattr(torch.ops.selectune, op)(first, *rest)


def _nobody_watches(*parts: Tensor) -> bool:
    """Whether torch's dispatcher would only pass the call on: no gradients, no tracing, no modes, no subclasses."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and internals.dispatch_modes() == 0
        and all(type(part) is Tensor and part.device.type in ("cpu", "cuda") for part in parts)
        and not torch.is_inference_mode_enabled()
    )


def _check(fine: bool, op: str, wanted: str, *got: Tensor) -> None:
    if not fine:
        shapes = ", ".join(f"{tuple(part.shape)} {str(part.dtype).removeprefix('torch.')}" for part in got)
        raise ConfigError(f"{op} takes {wanted}, and got {shapes or 'something else'}.")


def _check_indices(op: str, *parts: Tensor) -> None:
    _check(all(part.dtype in (torch.int32, torch.int64) for part in parts), op, "indices int32 or int64", *parts)


def _check_floats(op: str, *parts: Tensor) -> None:
    _check(all(part.dtype in FLOATS for part in parts), op, "float32, float64, bfloat16 or float16", *parts)


def _check_cutoff(op: str, cutoff: float) -> None:
    if cutoff != cutoff:
        raise ConfigError(f"{op} takes a cutoff that is a number, and got NaN.")
