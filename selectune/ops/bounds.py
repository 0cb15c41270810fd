"""Which entries of a weight gradient dy^T x may score above a cutoff, found without forming the gradient.

Letters: t tokens, o outputs, i inputs, d_i column i of dy, x_j column j of x.

    norms    |g_ij| <= |d_i| |x_j|
    int8     d_i = s_i q_i + e_i and x_j = z_j p_j + f_j with integers q, p in [-127, 127], so
             |g_ij| <= s_i z_j |q_i . p_j| + (|d_i| + |e_i|) |f_j| + |e_i| |x_j|; the integer products are exact

An entry whose bound, over its (|w_ij| + eps)^exp, is below the cutoff cannot be selected. Both bounds are enlarged by
more than rounding can take from them. The entries that are left get one score: `Factors.exact` sums their gradients in
float64, in the order of the tokens, so it depends on no library, thread or instruction set.

Which bound is used follows from constants, shapes and the numbers themselves, never from a timing.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from selectune import internals
from selectune.ops import backend, reference
from selectune.ops.cpu import bounded as loops
from selectune.ops.scratch import scratch

# nanoseconds of one core: an entry's product of one token, densely and as int8; reading an entry's bound; scoring an
# entry of a dense gradient; a token of an entry that is summed exactly; measuring and rounding a number of an operand
DENSE, INT8, SIFT, SCORE, EXACT, OPERAND = 0.013, 0.0035, 1.2, 1.0, 2.8, 0.7
SHARE = 0.02  # of a tensor's entries: more candidates than that are found by the dense product
SAFE = 1e-5  # what bounds exceed the truth by, at least
LEAST = 1e-25  # of a score and of the |g| that it asks for: below, products of scales would leave float32
LONGEST = 1 << 17  # tokens: above that a sum of products of int8 could leave int32


@dataclass(frozen=True)
class Columns:
    """An operand (t, n), column by column."""

    values: Tensor  # (t, n) float32, rows contiguous
    top: Tensor  # (n,) largest size of a number
    norm: Tensor  # (n,) at least the Euclidean norm


class Factors:
    """A gradient dy^T x before it is formed: dy (t, o), x (t, i), float32 on the CPU."""

    def __init__(self, dy: Tensor, x: Tensor) -> None:
        self.dy, self.x = dy.detach(), x.detach()

    @functools.cached_property
    def left(self) -> Columns:
        return _measured(self.dy)

    @functools.cached_property
    def right(self) -> Columns:
        return _measured(self.x)

    def largest(self) -> float:
        """At least |d_i| |x_j| of any entry."""
        return float(self.left.norm.max()) * float(self.right.norm.max())

    def rounding(self) -> float:
        """gamma: a score of a sum in float32, in any order, comes from a g wrong by at most gamma |d_i| |x_j|."""
        taken = (self.dy.shape[0] + 8) * 2.0**-24  # of the sum, and of the few operations of the score
        return taken / (1 - taken) if taken < 0.5 else math.inf

    def exact(self, flat: Tensor) -> Tensor:
        """The gradients of entries (m,): sums in float64, token by token, rounded once to float32."""
        width = self.x.shape[1]
        summed = loops.summed if backend.compiled() else reference.summed
        return summed(self.left.values, self.right.values, flat // width, flat % width).float()


def _measured(operand: Tensor) -> Columns:
    fits = operand.stride(1) == 1 and operand.stride(0) >= operand.shape[1]
    values = operand if fits else operand.contiguous()
    top, square = (loops.measure if backend.compiled() else reference.measure)(values)
    return Columns(values, top, _norm(square, values.shape[0]))


def _norm(square: Tensor, t: int) -> Tensor:
    """Norms out of sums of squares in float32: what rounding and underflow can take is added."""
    return square.sqrt() * (1 + t * 2.0**-23) + math.sqrt(t) * 1e-19


def above(
    factors: Factors,
    weight: Tensor,  # (o, i)
    exp: float,
    eps: float,
    cutoff: float,
) -> Tensor | None:  # (m,) int64 ascending: flat positions
    """All entries of dy^T x whose score |g| / (|w| + eps)^exp may reach the cutoff, and some that do not.

    None where the dense product is the better way: no cutoff yet or a tiny one, few tokens, too many candidates,
    numbers that are not finite, a processor without fast products of int8, loops that are not compiled.
    """
    t, o, i = factors.dy.shape[0], factors.dy.shape[1], factors.x.shape[1]
    least = cutoff * (1 - SAFE) * eps**exp  # of |g|, whatever the weight
    if not (cutoff < math.inf and min(cutoff, least) > LEAST and weight.is_contiguous() and pays(t, o, i)):
        return None
    left, right = factors.left, factors.right
    if not bool(torch.isfinite(left.norm).all() & torch.isfinite(right.norm).all()):
        return None
    found = _by_norms(left.norm, right.norm, least, t)
    return found if found is not None else _by_int8(left, right, weight, exp, eps, cutoff * (1 - SAFE))


def pays(t: int, o: int, i: int) -> bool:
    """Whether the int8 way beats the dense one where few candidates are left."""
    if t > LONGEST or not internals.fast_int8() or not backend.compiled():
        return False
    return t * o * i * INT8 + t * (o + i) * OPERAND + o * i * SIFT < o * i * (t * DENSE + SCORE)


def _by_norms(left: Tensor, right: Tensor, least: float, t: int) -> Tensor | None:
    """All pairs with |d_i| |x_j| >= least, if they are few enough to be summed at once."""
    o, i = left.numel(), right.numel()
    most = min(SHARE * o * i, (o * i * (t * INT8 + SIFT) + t * (o + i) * OPERAND) / (t * EXACT))
    falling, order = torch.sort(right, descending=True)
    needed = least / left.double().clamp(min=1e-300)
    counts = torch.searchsorted(-falling.double(), -needed, right=True)  # columns with a norm of at least `needed`
    total = int(counts.sum())
    if total > most:
        return None
    rows = torch.repeat_interleave(torch.arange(o), counts)
    place = torch.arange(total) - torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    return torch.sort(rows * i + order[place]).values


def _by_int8(left: Columns, right: Columns, weight: Tensor, exp: float, eps: float, cutoff: float) -> Tensor | None:
    t, (o, i) = left.values.shape[0], weight.shape
    if o < 2:
        return None  # torch's product of int8 is wrong for a single row (2.10 to 2.14)
    q, scales, lost = loops.rounded(left.values, left.top, "dy")
    p, steps, gone = loops.rounded(right.values, right.top, "x")
    # level * step in float32 is itself rounded: by 2^-24 of a number of the column
    rows = torch.stack((scales, left.norm, _norm(lost, t) + left.norm * 2.0**-22))
    columns = torch.stack((steps, right.norm, _norm(gone, t) + right.norm * 2.0**-22))
    room = scratch("weight gradient", (o, i), torch.int32)  # memory of the gradient that need not be formed
    products = internals.int8_product(q.t(), p, out=room)
    return loops.sift(products, weight, rows, columns, exp, eps, cutoff, max(1024, int(SHARE * o * i)))
