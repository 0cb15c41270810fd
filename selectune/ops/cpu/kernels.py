"""The ops on the CPU by numba: tensors in, tensors out; the loops are in `loops` and `passes`.

The loops are compiled at first use and cached on disk if that is allowed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from selectune import bits, seeds
from selectune.errors import ConfigError
from selectune.ops import reference
from selectune.ops.cpu.compiled import cached, loop, module
from selectune.ops.cpu.threads import launch
from selectune.ops.scratch import scratch
from selectune.seeds import Stream

STORED = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # numbers as in `vectors`

SHARES = 8  # shares of the tokens, at most, with separate sums: they depend on shapes alone, so threads change no bit
DESKS = 1 << 24  # scalars of x that all threads together may have transposed at once (64 MiB of float32)

_starts: Any = WeakIdKeyDictionary()  # rows of entries -> the checked shape, the starts of bands, columns

_SMALL = 4  # the score -|w| among the kinds of `passes`
_STAGED, _FEW = 1 << 20, 1 << 15  # candidates of a tensor that a stage holds; that one thread copies
_DRAWN = 256  # fewer numbers are not worth a loop
_FLOATS = (torch.float32, torch.float64)
_GATHERED = 512  # fewest entries in a block of the loop that transposes nothing


def tiles(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Transposes tiles of tokens in cache; each entry is then one dot product of two contiguous rows."""
    entries = _entries(rows, cols, dy.shape[1], x.shape[1])
    if entries is None:
        return _unsorted(tiles, dy, x, rows, cols)
    rows, cols, starts = entries
    loops, wide, dy, x = module("loops"), bits.wide(dy.dtype), _rows(dy), _rows(x)
    (t, o), i, k = dy.shape, x.shape[1], rows.numel()
    out = torch.zeros(k, dtype=wide)
    if t == 0 or k == 0:
        return out
    workers = max(1, min(torch.get_num_threads(), DESKS // (i * loops.PITCH)))
    shares = min(-(-t // loops.TILE), SHARES)
    parts = min(starts.numel() - 1, -(-2 * workers // shares))  # of each share's work; this changes no sum
    x_desks = scratch(f"x desks {wide}", (workers, i, loops.PITCH), wide)
    dy_desks = scratch(f"dy desks {wide}", (workers, loops.BAND, loops.PITCH), wide)
    sums = scratch(f"sums {wide}", (shares, k), wide)
    launch(
        loop("loops", "dots", wide),
        [t, o, i, k, dy.data_ptr(), x.data_ptr(), STORED[dy.dtype], dy.stride(0), x.stride(0), rows.data_ptr(),
         cols.data_ptr(), starts.data_ptr(), workers, x_desks.data_ptr(), dy_desks.data_ptr(), sums.data_ptr(), shares,
         parts],
        min(shares * parts, workers),
    )  # fmt: skip
    launch(loop("loops", "merge", wide), [k, sums.data_ptr(), shares, out.data_ptr()], -(-k // loops.SPAN))
    return out


def gather(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """A loop over tokens for every block of entries; float32 and float64."""
    entries = _entries(rows, cols, dy.shape[1], x.shape[1])
    if entries is None:
        return _unsorted(gather, dy, x, rows, cols)
    rows, cols, _ = entries
    out = torch.zeros(rows.numel(), dtype=dy.dtype)
    if rows.numel():
        dy, x = _rows(dy), _rows(x)
        blocks = -(-rows.numel() // max(_GATHERED, rows.numel() // 64))
        launch(
            loop("loops", "gather", dy.dtype),
            [dy.shape[0], rows.numel(), dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), rows.data_ptr(),
             cols.data_ptr(), out.data_ptr(), blocks],
            blocks,
        )  # fmt: skip
    return out


def score_filter(
    weight: Tensor, gradient: Tensor, exp: float, eps: float, cutoff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.score_filter` in one pass: candidates go to a small stage first, then to their place."""
    return _filtered(weight.contiguous(), gradient.contiguous(), {0.0: 0, 1.0: 1, 2.0: 2}.get(exp, 3), exp, eps, cutoff)


def small_filter(weight: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.small_filter` in one pass."""
    weight = weight.contiguous()
    return _filtered(weight, weight, _SMALL, 0.0, 0.0, cutoff)


def _filtered(
    weight: Tensor, gradient: Tensor, kind: int, exp: float, eps: float, cutoff: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, wide, passes = weight.numel(), bits.wide(weight.dtype), module("passes")
    blocks = -(-n // passes.BLOCK)
    room = min(n, max(1 << 14, min(n // 4, _STAGED)))  # a second pass finds the candidates beyond it
    stage = scratch("staged positions", (room,), torch.int64), scratch(f"staged scores {wide}", (room,), wide)
    state, counts = torch.zeros(2, dtype=torch.int64), torch.zeros(2, blocks, dtype=torch.int64)
    places = torch.zeros(blocks, dtype=torch.int64)
    real = torch.tensor([exp, eps, cutoff], dtype=torch.float64)
    filtering = loop("passes", "filter", wide)
    common = [
        n, weight.data_ptr(), STORED[weight.dtype], gradient.data_ptr(), STORED[gradient.dtype], kind,
        real.data_ptr(), room, stage[0].data_ptr(), stage[1].data_ptr(), state.data_ptr(), counts.data_ptr(),
        places.data_ptr(),
    ]  # fmt: skip
    launch(filtering, [*common, 0, 0, 0, 0], blocks)
    found = int(state[0])
    counts[1] = counts[0].cumsum(0) - counts[0]
    positions, scores = torch.empty(found, dtype=torch.int64), torch.empty(found, dtype=wide)
    if found:
        alone = found <= _FEW and found <= room  # a copy from the stage is not worth waking other threads
        launch(filtering, [*common, found, positions.data_ptr(), scores.data_ptr(), 1], 1 if alone else blocks)
    return positions, scores, state[1] == 0


def scatter_values(weight: Tensor, flat: Tensor, values: Tensor, slots: Tensor) -> None:
    """`reference.scatter_values` in one pass."""
    if not weight.is_contiguous() or weight.dtype not in STORED or values.dtype not in (torch.float32, torch.float64):
        reference.scatter_values(weight, flat, values, slots)
        return
    flat, slots, values = (part.contiguous() for part in (flat.long(), slots.long(), values))
    bad = torch.zeros(1, dtype=torch.int64)
    launch(
        loop("passes", "scatter", values.dtype),
        [weight.numel(), weight.data_ptr(), STORED[weight.dtype], flat.numel(), flat.data_ptr(), values.data_ptr(),
         values.numel(), slots.data_ptr(), bad.data_ptr()],
        -(-flat.numel() // module("passes").SPAN),
    )  # fmt: skip
    _refuse_bad(bad, weight.numel(), values)


def scatter_many(
    weights: Sequence[Tensor], flats: Sequence[Tensor], values: Tensor, slots: Sequence[Tensor]
) -> list[int]:
    """`scatter_values` into all weights in one launch; returns those that it could not take."""
    fits = [
        w.is_contiguous() and w.dtype in STORED and f.dtype == s.dtype == torch.int64 and f.is_contiguous()
        and s.is_contiguous()
        for w, f, s in zip(weights, flats, slots, strict=True)
    ]  # fmt: skip
    if not values.is_contiguous() or values.dtype not in (torch.float32, torch.float64):
        return list(range(len(weights)))
    table = torch.tensor(
        [
            [w.numel(), w.data_ptr(), STORED[w.dtype], f.numel(), f.data_ptr(), s.data_ptr()]
            for w, f, s, fit in zip(weights, flats, slots, fits, strict=True)
            if fit
        ],
        dtype=torch.int64,
    )
    bad = torch.zeros(1, dtype=torch.int64)
    if len(table):
        launch(
            loop("passes", "scatter_many", values.dtype),
            [len(table), table.data_ptr(), values.data_ptr(), values.numel(), bad.data_ptr()],
            len(table),
        )
    _refuse_bad(bad, max((w.numel() for w in weights), default=0), values)
    return [index for index, fit in enumerate(fits) if not fit]


def _refuse_bad(bad: Tensor, entries: int, values: Tensor) -> None:
    if bool(bad):
        raise ConfigError(
            f"scatter_values got an index out of range: flat must be in [0, {entries}), slots in "
            f"[0, {values.numel()}). Entries in range were written."
        )


def adamw_step(
    values: Tensor, gradient: Tensor, m: Tensor, v: Tensor, ages: Tensor | None, step: int,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """`reference.adamw_step` in one pass over the four vectors."""
    parts = [part for part in (values, gradient, m, v, ages) if part is not None]
    if values.dtype not in (torch.float32, torch.float64) or not all(part.is_contiguous() for part in parts):
        reference.adamw_step(values, gradient, m, v, ages, step, lr, beta1, beta2, eps, weight_decay)
        return
    none = torch.zeros(1, dtype=values.dtype)
    powers = (none, none) if ages is None else tuple(reference.powers(b, step, values.dtype) for b in (beta1, beta2))
    longest = min(p.numel() for p in powers)
    if ages is not None:
        longest = max(p.numel() for p in powers)
        powers = tuple(torch.nn.functional.pad(p, (0, longest - p.numel())) for p in powers)
    real = torch.tensor([lr, beta1, beta2, eps, weight_decay, 1 - beta1**step, 1 - beta2**step], dtype=torch.float64)
    launch(
        loop("passes", "adamw", values.dtype),
        [values.numel(), *(part.data_ptr() for part in (values, gradient, m, v)),
         0 if ages is None else ages.numel(), 0 if ages is None else ages.data_ptr(), real.data_ptr(), longest,
         powers[0].data_ptr(), powers[1].data_ptr()],
        -(-values.numel() // module("passes").SPAN),
    )  # fmt: skip


def checksum(tensor: Tensor, at: Tensor | None = None) -> int:
    """`reference.checksum` of a whole tensor in one pass."""
    if at is not None:
        return reference.checksum(tensor, at)
    found, total = bits.flat_view(tensor), torch.zeros(1, dtype=torch.int64)
    blocks = -(-found.numel() // module("passes").SUMMED)
    launch(loop("passes", "sum", found.dtype), [found.numel(), found.data_ptr(), total.data_ptr()], blocks)
    return int(total) % (1 << 64)


def uniform(like: Tensor, stream: Stream, out: Tensor | None = None) -> Tensor:
    """`seeds.uniform`, bit for bit, in one pass."""
    if like.numel() < _DRAWN or like.dtype not in _FLOATS:
        return seeds.uniform(like, stream, out)
    out = torch.empty(like.shape, dtype=like.dtype) if out is None or not out.is_contiguous() else out
    _drawing(like.dtype)(np.uint64(stream.key), stream.take(like.numel()), out.view(-1).numpy())
    return out


@functools.cache
def _drawing(dtype: torch.dtype) -> Callable[..., None]:
    numba = importlib.import_module("numba")
    function = getattr(module("passes"), f"uniform_{str(dtype).removeprefix('torch.')}")
    return cached(lambda cache: numba.njit(cache=cache), function.py_func)


def _entries(rows: Tensor, cols: Tensor, o: int, i: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Entries as int32 and the start of each band of rows, cached while `rows` lives; None if rows do not ascend."""
    state = None if rows.is_inference() or cols.is_inference() else (id(cols), rows._version, cols._version, o, i)
    known = _starts.get(rows)
    if state is not None and known is not None and known[0] == state:
        return rows, cols, known[1]
    loops = module("loops")
    starts = torch.zeros(-(-o // loops.BAND) + 1, dtype=torch.int64)
    narrow_rows, narrow_cols = rows.to(torch.int32).contiguous(), cols.to(torch.int32).contiguous()
    found = _bands()(narrow_rows.numpy(), narrow_cols.numpy(), o, i, starts.numpy())
    if found == 2:
        raise ConfigError(f"sampled_matmul got an entry out of range: rows must be in [0, {o}), columns in [0, {i}).")
    if found == 1:
        return None
    if state is not None and narrow_rows is rows and narrow_cols is cols:
        _starts[rows] = (state, starts, cols)
    return narrow_rows, narrow_cols, starts


def _unsorted(way: Callable[..., Tensor], dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    order = torch.argsort(rows, stable=True)
    out = torch.empty(rows.numel(), dtype=bits.wide(dy.dtype))
    out[order] = way(dy, x, rows[order], cols[order])
    return out


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows; a row of it may be longer than it is wide."""
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


@functools.cache
def _bands() -> Callable[..., int]:
    numba = importlib.import_module("numba")
    return cached(lambda cache: numba.njit(cache=cache), module("loops").bands.py_func)
