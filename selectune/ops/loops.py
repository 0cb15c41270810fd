"""The CPU's loops: the weight gradient at its support.

Every loop claims blocks of work (see `threads`) and sums in an order that depends on the shapes and the
entries only, never on how many threads there are.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from selectune.ops.vectors import (
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

TILE = 128  # tokens that are turned and multiplied at once
PITCH = TILE + 16  # of a turned row: not a power of two, which would fall into few cache sets
BAND = 32  # output rows a thread takes at once

_SUMS = {"contract", "reassoc"}  # fused and vectorised sums; NaN and infinity keep their meaning


@njit(error_model="numpy")
def _turn(source, stored, pitch, rows, cols, target, dtype):  # type: ignore[no-untyped-def]
    """(rows, cols) at `source`, widened, as (cols, TILE) at `target`; what is beyond `rows` is 0."""
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
    """One row at the edge of what whole squares cover, element by element."""
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


@njit(error_model="numpy")
def _pack(counter, t, i, x, stored, pitch, turned, dtype):  # type: ignore[no-untyped-def]
    """x (t, i) -> turned (tiles, i, PITCH): every tile of tokens with tokens innermost."""
    size = 8 if dtype is np.float64 else (4 if stored == FLOAT32 else 2)
    wide = 8 if dtype is np.float64 else 4
    tiles, bands = (t + TILE - 1) // TILE, (i + BAND - 1) // BAND
    while True:
        block = fetch_add(counter, 1)
        if block >= tiles * bands:
            return
        tile, c = block // bands, block % bands * BAND
        _turn(
            x + (tile * TILE * pitch + c) * size, stored, pitch, min(TILE, t - tile * TILE), min(BAND, i - c),
            turned + (tile * i + c) * PITCH * wide, dtype,
        )  # fmt: skip


@njit(fastmath=_SUMS, error_model="numpy")
def _dots(counter, t, o, dy, stored, pitch, turned, rows, cols, starts, out, dtype):  # type: ignore[no-untyped-def]
    """out_k += the dot products of turned rows, per band of output rows, per tile of tokens."""
    size = 8 if dtype is np.float64 else (4 if stored == FLOAT32 else 2)
    band_rows = np.empty((BAND, PITCH), dtype)
    while True:
        band = fetch_add(counter, 1)
        if band >= starts.size - 1:
            return
        first, last, r = starts[band], starts[band + 1], band * BAND
        if first == last:
            continue
        for tile in range((t + TILE - 1) // TILE):
            where = dy + (tile * TILE * pitch + r) * size
            tokens = min(TILE, t - tile * TILE)
            _turn(where, stored, pitch, tokens, min(BAND, o - r), band_rows.ctypes.data, dtype)
            _dots_of_band(first, last, r, band_rows, turned[tile], rows, cols, out, dtype)


@njit(fastmath=_SUMS, error_model="numpy")
def _dots_of_band(first, last, r, band_rows, x, rows, cols, out, dtype):  # type: ignore[no-untyped-def]
    """Four entries of one row at a time share the loads of that row."""
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
    """Few entries: one pass over the tokens for every block of them, nothing turned."""
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
    """Where each band's entries start; 0 = fine, 1 = rows do not ascend, 2 = an index is out of range."""
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
def _run_pack(data, dtype):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    _pack(a[0], a[1], a[2], a[3], a[4], a[5], a[6], dtype)


@njit
def _run_dots(data, dtype):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    t, o, i, k = a[1], a[2], a[3], a[4]
    tiles, count = (t + TILE - 1) // TILE, (o + BAND - 1) // BAND
    _dots(
        a[0], t, o, a[5], a[6], a[7], carray(pointer(a[8]), (tiles, i, PITCH), dtype),
        carray(pointer(a[9]), k, np.int32), carray(pointer(a[10]), k, np.int32),
        carray(pointer(a[11]), count + 1, np.int64), carray(pointer(a[12]), k, dtype), dtype,
    )  # fmt: skip


@njit
def _run_gather(data, dtype):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    t, k = a[1], a[2]
    _gather(
        a[0], t, carray(pointer(a[3]), (t, a[4]), dtype), carray(pointer(a[5]), (t, a[6]), dtype),
        carray(pointer(a[7]), k, np.int32), carray(pointer(a[8]), k, np.int32),
        carray(pointer(a[9]), k, dtype), a[10],
    )  # fmt: skip


def pack_float32(data):  # type: ignore[no-untyped-def]
    _run_pack(data, np.float32)


def pack_float64(data):  # type: ignore[no-untyped-def]
    _run_pack(data, np.float64)


def dots_float32(data):  # type: ignore[no-untyped-def]
    _run_dots(data, np.float32)


def dots_float64(data):  # type: ignore[no-untyped-def]
    _run_dots(data, np.float64)


def gather_float32(data):  # type: ignore[no-untyped-def]
    _run_gather(data, np.float32)


def gather_float64(data):  # type: ignore[no-untyped-def]
    _run_gather(data, np.float64)
