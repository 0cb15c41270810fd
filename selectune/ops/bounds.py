"""Which entries of a weight gradient dy^T x may score above a cutoff, found without forming the gradient.

Letters: t tokens, o outputs, i inputs, d_i column i of dy, x_j column j of x.

    norms    |g_ij| <= |d_i| |x_j|
    int8     d_i = s_i q_i + e_i and x_j = z_j p_j + f_j with integers q, p in [-127, 127], so
             |g_ij| = s_i z_j |q_i . p_j| up to (|d_i| + |e_i|) |f_j| + |e_i| |x_j|; the integer products are exact
    sampled  the float32 sum of an entry is wrong by at most gamma_t |d_i| |x_j|

A score is |g| f(|w|), where the `Weighting` f rises or falls throughout. An entry whose bound, times its f(|w|), is
below the cutoff cannot be selected. Without a cutoff, lower bounds of the int8 way give one: the quota-th best among
the best of every few entries. All bounds are enlarged by more than rounding can take from them. The entries that are
left get one score: `Factors.exact` sums their gradients in float64, in the order of the tokens, so it depends on no
library, thread or instruction set.

Which bound is used follows from constants, shapes and the numbers themselves, never from a timing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from selectune import internals
from selectune.ops import backend, reference
from selectune.ops.cpu import bounded as loops
from selectune.ops.scratch import scratch

SHIFT = 19  # as in `bound_loops`: weights that share their bits from there on share bounds on f

# nanoseconds of one core: an entry's product of one token, densely and as int8; reading an entry's bound, and its lower
# bound; scoring an entry of a dense gradient; a token of an entry that is summed exactly; measuring and rounding a
# number of an operand
DENSE, INT8, SIFT, REACH, SCORE, EXACT, OPERAND = 0.013, 0.0035, 1.2, 4.0, 1.0, 2.8, 0.7
SHARE = 0.02  # of a tensor's entries: more candidates than that are found by the dense product
FEW = 512  # candidates that are summed exactly at once; of more, sums in float32 dismiss most first
SAFE = 1e-5  # what bounds exceed the truth by, at least
LEAST = 1e-25  # of a cutoff; |g| below it may be anything, as products of scales would leave float32
FEWEST = 32  # entries for each of a quota whose cutoff comes from lower bounds
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
        """The gradients of entries (m,): sums in float64, token by token."""
        width = self.x.shape[1]
        summed = loops.summed if backend.compiled() else reference.summed
        return summed(self.left.values, self.right.values, flat // width, flat % width)


class Weighting:
    """f of a score |g| f(|w|), bounded by the leading bits of |w|."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        """`function` takes sizes (n,) float64 to f >= 0, which may be infinite at 0, and rises or falls throughout."""
        edges = (torch.arange(1 << (31 - SHIFT)) << SHIFT).int().view(torch.float32).double()
        edges = edges[edges < math.inf]
        ends = function(torch.cat((edges, edges.new_tensor([torch.finfo(torch.float32).max])))).double()
        special = ends.new_full(((1 << (31 - SHIFT)) - edges.numel(),), math.inf)  # of infinity and NaN
        self._function = function
        self._rises = bool(ends[-1] > ends[0])
        self._first = float(ends[0])
        self.most = torch.cat((torch.maximum(ends[:-1], ends[1:]), special)).nan_to_num(math.inf, math.inf)  # (bins,)
        self.least = torch.cat((torch.minimum(ends[:-1], ends[1:]), 0 * special)).nan_to_num(0.0)

    def __call__(self, weight: Tensor) -> Tensor:
        """f of weights (n,), in float64."""
        return self._function(weight.double().abs())

    def top(self, weight: Tensor) -> float:
        """At least f of any of these weights."""
        if not self._rises:
            return self._first
        return float(self(torch.stack(torch.aminmax(weight.detach()))).max())


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
    weighting: Weighting,
    cutoff: float,
    quota: int = 0,
    barred: Tensor | None = None,  # (k,) flat positions that are not asked for
) -> Tensor | None:  # (m,) int64 ascending: flat positions
    """All entries of dy^T x whose score |g| f(|w|) may reach the cutoff, and some that do not.

    Without a cutoff (-inf): all that may be among the best `quota` that are not barred.
    None where the dense product is the better way: a tiny cutoff, few tokens, too many candidates, numbers that are
    not finite, a processor without fast products of int8, loops that are not compiled.
    """
    t, o, i = factors.dy.shape[0], factors.dy.shape[1], factors.x.shape[1]
    unknown = cutoff == -math.inf and 0 < quota <= o * i // FEWEST
    if not ((unknown or LEAST < cutoff < math.inf) and weight.is_contiguous()) or not pays(t, o, i, unknown):
        return None
    left, right = factors.left, factors.right
    if not bool(torch.isfinite(left.norm).all() & torch.isfinite(right.norm).all()):
        return None
    top = weighting.top(weight)
    if not unknown:
        found = _by_norms(left.norm, right.norm, _least(cutoff, top), t)
        if found is not None:
            return found
    return _by_int8(left, right, weight, weighting, top, cutoff, quota, barred)


def nearer(
    factors: Factors, weight: Tensor, weighting: Weighting, cutoff: float, flat: Tensor, sums: Tensor
) -> Tensor:  # (k,) int64
    """Those of the entries (m,) that may reach the cutoff, by sums (m,) in float32 in any order."""
    rows, columns = flat // weight.shape[1], flat % weight.shape[1]
    off = factors.rounding() * factors.left.norm[rows].double() * factors.right.norm[columns].double()
    most = (sums.double().abs() + off) * weighting(weight.reshape(-1)[flat])
    return flat[~(most < cutoff * (1 - SAFE))]  # what is not a number stays


def _least(cutoff: float, top: float) -> float:
    """What |g| must reach where no weight multiplies it by more than `top`."""
    least = cutoff * (1 - SAFE) / top if 0 < top < math.inf else 0.0
    return least if least > LEAST else 0.0


def pays(t: int, o: int, i: int, unknown: bool) -> bool:
    """Whether the int8 way beats the dense one where few candidates are left; `unknown`: without a cutoff."""
    if t > LONGEST or not internals.fast_int8() or not backend.compiled():
        return False
    reading = SIFT + REACH if unknown else SIFT
    return t * o * i * INT8 + t * (o + i) * OPERAND + o * i * reading < o * i * (t * DENSE + SCORE)


def _by_norms(left: Tensor, right: Tensor, least: float, t: int) -> Tensor | None:
    """All pairs with |d_i| |x_j| >= least, if they are few enough to be summed at once."""
    o, i = left.numel(), right.numel()
    if least == 0:
        return None
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


def _by_int8(
    left: Columns,
    right: Columns,
    weight: Tensor,
    weighting: Weighting,
    top: float,
    cutoff: float,
    quota: int,
    barred: Tensor | None,
) -> Tensor | None:
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
    if cutoff == -math.inf:
        if barred is not None:
            products.view(-1)[barred] = 0
        worth = weighting.least.clamp(max=1e5).float()  # a bound above LEAST then comes from a |g| above 1e-30
        reached = loops.reach(products, weight, rows, columns, worth, 1 - SAFE)
        cutoff = float(reached.topk(quota).values[-1]) * (1 - SAFE)
        if not LEAST < cutoff < math.inf:
            return None
    needed = cutoff * (1 - SAFE) / weighting.most
    needed = needed.masked_fill(needed < LEAST, 0.0).clamp(max=1e38).float()
    floor = min(_least(cutoff, top), 1e38)
    return loops.sift(products, weight, rows, columns, needed, floor, max(1024, int(SHARE * o * i)))
