"""The CPU's loops: the weight gradient at its support.

Every loop claims blocks of work (see `threads`). Its order of summing depends only on the shapes and the entries, never
on the number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from selectune.ops.cpu.vectors import (
    BFLOAT16,
    FLOAT32,
    fetch_add,
    float16_bits_to_float32_bits,
    pointer,
    square_bfloat16,
    square_float16,
    square_float32,
    square_float64,
)

TILE = 64  # tokens that are transposed and multiplied at once; the transposed tile must fit a core's cache
PITCH = TILE + 16  # length of a transposed row: not a power of two, which would use few cache sets
BAND = 768  # output rows transposed at once: many, so that memory is read along its rows
SPAN = 1 << 14  # entries whose sums are merged at once

_SUMS = {"contract", "reassoc"}  # allows fused and vectorised sums; NaN and infinity keep their meaning


@njit(error_model="numpy")
def _turn(source, stored, pitch, rows, cols, target, dtype):  # type: ignore[no-untyped-def]
    """Transpose and widen (rows, cols) at `source` to (cols, TILE) at `target`; columns beyond `rows` are 0."""
    lanes = 8 if dtype is np.float64 else 16
    wide = 8 if dtype is np.float64 else 4
    size = 8 if dtype is np.float64 else (4 if stored == FLOAT32 else 2)
    row_end, col_end = rows - rows % lanes, cols - cols % lanes
    for r in range(0, row_end, lanes):
        for c in range(0, col_end, lanes):
            here, there = source + (r * pitch + c) * size, target + (c * PITCH + r) * wide
            if dtype is np.float64:
                square_float64(here, pitch * 8, there, PITCH * 8)
            elif stored == FLOAT32:
                square_float32(here, pitch * 4, there, PITCH * 4)
            elif stored == BFLOAT16:
                square_bfloat16(here, pitch * 2, there, PITCH * 4)
            else:
                square_float16(here, pitch * 2, there, PITCH * 4)
    out = carray(pointer(target), (cols, PITCH), dtype)
    if row_end < rows or col_end < cols:
        for r in range(rows):
            first = col_end if r < row_end else 0
            _widen_row(source + r * pitch * size, stored, first, cols, out, r, dtype)
    for c in range(cols):
        for r in range(rows, TILE):
            out[c, r] = 0


@njit(error_model="numpy")
def _widen_row(source, stored, first, last, out, column, dtype):  # type: ignore[no-untyped-def]
    """One row beyond the whole squares, element by element."""
    if dtype is np.float64:
        whole = carray(pointer(source), last, np.float64)
        for c in range(first, last):
            out[c, column] = whole[c]
    elif stored == FLOAT32:
        single = carray(pointer(source), last, np.float32)
        for c in range(first, last):
            out[c, column] = single[c]
    else:
        half = carray(pointer(source), last, np.uint16)
        for c in range(first, last):
            out[c, column] = _widen_half(half[c], stored)


@njit(inline="always")
def _widen_half(half, stored):  # type: ignore[no-untyped-def]
    if stored == BFLOAT16:
        return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)
    return np.uint32(float16_bits_to_float32_bits(half)).view(np.float32)


@njit(fastmath=_SUMS, error_model="numpy")
def _dots(counter, sizes, dy, x, stored, pitches, rows, cols, starts, x_desks, dy_desks, sums, parts, dtype):  # type: ignore[no-untyped-def]
    """sums (shares, k): dot products of transposed columns, per share of the tokens and part of the bands of rows."""
    size = 8 if dtype is np.float64 else (4 if stored == FLOAT32 else 2)
    desk = fetch_add(counter + 8, 1)  # this thread's own memory
    x_desk, dy_desk = x_desks[desk], dy_desks[desk]
    (t, o, i), (dy_pitch, x_pitch) = sizes, pitches
    tiles, bands, shares = (t + TILE - 1) // TILE, starts.size - 1, sums.shape[0]
    while True:
        block = fetch_add(counter, 1)
        if block >= shares * parts:
            return
        share, part = block // parts, block % parts
        begin, end = part * bands // parts, (part + 1) * bands // parts
        sums[share, starts[begin] : starts[end]] = 0
        if starts[begin] == starts[end]:
            continue
        for tile in range(share * tiles // shares, (share + 1) * tiles // shares):
            first, tokens = tile * TILE, min(TILE, t - tile * TILE)
            _turn(x + first * x_pitch * size, stored, x_pitch, tokens, i, x_desk.ctypes.data, dtype)
            for band in range(begin, end):
                k, last, r = starts[band], starts[band + 1], band * BAND
                if k < last:
                    where = dy + (first * dy_pitch + r) * size
                    _turn(where, stored, dy_pitch, tokens, min(BAND, o - r), dy_desk.ctypes.data, dtype)
                    _dots_of_band(k, last, r, dy_desk, x_desk, rows, cols, sums[share], dtype)


@njit(error_model="numpy")
def _merge(counter, sums, out):  # type: ignore[no-untyped-def]
    """out_k += the shares' sums, one after the other."""
    while True:
        first = fetch_add(counter, 1) * SPAN
        if first >= out.size:
            return
        last = min(out.size, first + SPAN)
        for share in range(sums.shape[0]):
            for k in range(first, last):
                out[k] += sums[share, k]


@njit(fastmath=_SUMS, error_model="numpy")
def _dots_of_band(first, last, r, band_rows, x, rows, cols, out, dtype):  # type: ignore[no-untyped-def]
    """Computes four entries of one row at a time, which share the loads of that row."""
    k = first
    while k < last:
        d = band_rows[rows[k] - r]
        if k + 3 < last and rows[k + 3] == rows[k]:
            x0, x1, x2, x3 = x[cols[k]], x[cols[k + 1]], x[cols[k + 2]], x[cols[k + 3]]
            s0, s1, s2, s3 = dtype(0), dtype(0), dtype(0), dtype(0)
            for a in range(TILE):
                s0 += d[a] * x0[a]
                s1 += d[a] * x1[a]
                s2 += d[a] * x2[a]
                s3 += d[a] * x3[a]
            out[k] += s0
            out[k + 1] += s1
            out[k + 2] += s2
            out[k + 3] += s3
            k += 4
        else:
            x0, s0 = x[cols[k]], dtype(0)
            for a in range(TILE):
                s0 += d[a] * x0[a]
            out[k] += s0
            k += 1


@njit(fastmath=_SUMS, error_model="numpy")
def _gather(counter, t, dy, x, rows, cols, out, blocks):  # type: ignore[no-untyped-def]
    """For few entries: one pass over the tokens for every block of entries, without transposing."""
    per = (rows.size + blocks - 1) // blocks
    while True:
        block = fetch_add(counter, 1)
        if block >= blocks:
            return
        first, last = block * per, min(rows.size, (block + 1) * per)
        for a in range(t):
            for k in range(first, last):
                out[k] += dy[a, rows[k]] * x[a, cols[k]]


@njit
def bands(rows, cols, o, i, starts):  # type: ignore[no-untyped-def]
    """Find the start of each band's entries; returns 0, or 1 if rows do not ascend, 2 if an index is out of range."""
    band, before = 0, 0
    for k in range(rows.size):
        row = rows[k]
        if row < 0 or row >= o or cols[k] < 0 or cols[k] >= i:
            return 2
        if row < before:
            return 1
        before = row
        while band <= row // BAND:
            starts[band] = k
            band += 1
    while band < starts.size:
        starts[band] = rows.size
        band += 1
    return 0


@njit
def _run_dots(data, dtype):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    t, o, i, k, desks = a[1], a[2], a[3], a[4], a[13]
    bands = (o + BAND - 1) // BAND
    _dots(
        a[0], (t, o, i), a[5], a[6], a[7], (a[8], a[9]), carray(pointer(a[10]), k, np.int32),
        carray(pointer(a[11]), k, np.int32), carray(pointer(a[12]), bands + 1, np.int64),
        carray(pointer(a[14]), (desks, i, PITCH), dtype), carray(pointer(a[15]), (desks, BAND, PITCH), dtype),
        carray(pointer(a[16]), (a[17], k), dtype), a[18], dtype,
    )  # fmt: skip


@njit
def _run_merge(data, dtype):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    _merge(a[0], carray(pointer(a[2]), (a[3], a[1]), dtype), carray(pointer(a[4]), a[1], dtype))


@njit
def _run_gather(data, dtype):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    t, k = a[1], a[2]
    _gather(
        a[0], t, carray(pointer(a[3]), (t, a[4]), dtype), carray(pointer(a[5]), (t, a[6]), dtype),
        carray(pointer(a[7]), k, np.int32), carray(pointer(a[8]), k, np.int32),
        carray(pointer(a[9]), k, dtype), a[10],
    )  # fmt: skip


def dots_float32(data):  # type: ignore[no-untyped-def]
    _run_dots(data, np.float32)


def dots_float64(data):  # type: ignore[no-untyped-def]
    _run_dots(data, np.float64)


def merge_float32(data):  # type: ignore[no-untyped-def]
    _run_merge(data, np.float32)


def merge_float64(data):  # type: ignore[no-untyped-def]
    _run_merge(data, np.float64)


def gather_float32(data):  # type: ignore[no-untyped-def]
    _run_gather(data, np.float32)


def gather_float64(data):  # type: ignore[no-untyped-def]
    _run_gather(data, np.float64)
