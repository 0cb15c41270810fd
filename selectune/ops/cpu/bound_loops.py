"""The CPU's loops for bounds on a weight gradient: columns measured and rounded, entries that may score enough."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from selectune.ops.cpu.passes import GROUP, _widen
from selectune.ops.cpu.vectors import FLOAT32, fetch_add, pointer

COLUMNS = 256  # of an operand, at least, measured or rounded at once
ROWS = 16  # of a product, filtered at once
ENTRIES = 512  # summed at once
TINY = np.float32(1e-30)  # a column below it is all error
LEVELS = np.float32(127)
ROUNDING = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer


@njit(error_model="numpy")
def _measure(counter, t, n, x, pitch, top, square, width):  # type: ignore[no-untyped-def]
    """The largest |x| and the sum of squares of every column of (t, n)."""
    while True:
        first = fetch_add(counter, 1) * width
        if first >= n:
            return
        last = min(n, first + width)
        most, total = top[first:last], square[first:last]
        most[:] = 0
        total[:] = 0
        for r in range(t):
            row = carray(pointer(x + (r * pitch + first) * 4), last - first, np.float32)
            for j in range(last - first):
                size = abs(row[j])
                most[j] = size if size > most[j] else most[j]
                total[j] += size * size


@njit(error_model="numpy")
def _round(counter, t, n, x, pitch, top, q, scale, lost, width):  # type: ignore[no-untyped-def]
    """Every column in 255 levels; its scale, and the sum of squares of what rounding loses."""
    inverse = np.empty(width, np.float32)
    while True:
        first = fetch_add(counter, 1) * width
        if first >= n:
            return
        last = min(n, first + width)
        for j in range(last - first):
            fine = top[first + j] > TINY
            inverse[j] = LEVELS / top[first + j] if fine else np.float32(0)
            scale[first + j] = top[first + j] / LEVELS if fine else np.float32(0)
        gone, step = lost[first:last], scale[first:last]
        gone[:] = 0
        for r in range(t):
            row = carray(pointer(x + (r * pitch + first) * 4), last - first, np.float32)
            out = carray(pointer(q + r * n + first), last - first, np.int8)
            for j in range(last - first):
                level = (row[j] * inverse[j] + ROUNDING) - ROUNDING
                error = row[j] - level * step[j]
                gone[j] += error * error
                out[j] = np.int8(np.int32(level))


@njit(error_model="numpy")
def _least(kind, w, eps, bound):  # type: ignore[no-untyped-def]
    """What |g| must reach for an entry to score `bound`."""
    if kind == 0:
        return bound
    size = abs(w) + eps
    return size * bound if kind == 1 else size * size * bound


@njit(error_model="numpy")
def _far(q, near, right, lost, full, a, c, floor):  # type: ignore[no-untyped-def]
    """Whether no entry of a group can reach `floor`, the least that any weight asks of |g|."""
    count = np.int32(0)
    for j in range(GROUP):
        most = abs(np.float32(q[j])) * (near * right[j]) + a * lost[j] + c * full[j]
        count += np.int32(0) if most < floor else np.int32(1)
    return count == 0


@njit(error_model="numpy")
def _sift(counter, o, n, q, weight, stored, rows, columns, kind, eps, bound, room, out, found):  # type: ignore[no-untyped-def]
    """Entries of (o, n) whose bound on |g| reaches what the cutoff asks for; all are counted, `room` are kept.

    `rows`: scale, norm, lost of the rows, one behind the other; `columns`: the same of the columns.
    """
    w = np.empty(n, np.float32)
    floor = _least(kind, np.float32(0), eps, bound)  # of a weight that is 0: most groups end here, their weights unread
    right, lost, full = columns[:n], columns[2 * n :], columns[n : 2 * n]
    while True:
        first = fetch_add(counter, 1) * ROWS
        if first >= o:
            return
        for i in range(first, min(o, first + ROWS)):
            near, a, c = rows[i], rows[o + i] + rows[2 * o + i], rows[2 * o + i]
            values = carray(pointer(q + i * n * 4), n, np.int32)
            known = False
            for begin in range(0, n, GROUP):
                end = min(n, begin + GROUP)
                part = slice(begin, end)
                if end - begin == GROUP and _far(values[part], near, right[part], lost[part], full[part], a, c, floor):
                    continue
                if not known and stored == FLOAT32:
                    w = carray(pointer(weight + i * n * 4), n, np.float32)
                elif not known and kind != 0:
                    _widen(weight, stored, i * n, n, w)
                known = True
                for j in range(begin, end):
                    most = abs(np.float32(values[j])) * (near * right[j]) + a * lost[j] + c * full[j]
                    if not (most < _least(kind, w[j], eps, bound)):
                        place = fetch_add(found, 1)
                        if place < room:
                            out[place] = i * n + j


@njit(error_model="numpy")
def _sum_exactly(counter, t, k, dy, dy_pitch, x, x_pitch, rows, cols, out):  # type: ignore[no-untyped-def]
    """Sums of products over tokens in float64, in the order of the tokens."""
    while True:
        first = fetch_add(counter, 1) * ENTRIES
        if first >= k:
            return
        last = min(k, first + ENTRIES)
        total = out[first:last]
        total[:] = 0
        for r in range(t):
            left, right = dy + r * dy_pitch * 4, x + r * x_pitch * 4
            for e in range(last - first):
                a = carray(pointer(left + rows[first + e] * 4), 1, np.float32)[0]
                b = carray(pointer(right + cols[first + e] * 4), 1, np.float32)[0]
                total[e] += np.float64(a) * np.float64(b)


@njit
def _run_measure(data):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    n = a[2]
    _measure(a[0], a[1], n, a[3], a[4], carray(pointer(a[5]), n, np.float32), carray(pointer(a[6]), n, np.float32),
             a[7])  # fmt: skip


@njit
def _run_round(data):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    n = a[2]
    top, scale, lost = (carray(pointer(a[5]), n, np.float32), carray(pointer(a[7]), n, np.float32),
                        carray(pointer(a[8]), n, np.float32))  # fmt: skip
    _round(a[0], a[1], n, a[3], a[4], top, a[6], scale, lost, a[9])


@njit
def _run_sift(data):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    o, n = a[1], a[2]
    real = carray(pointer(a[9]), 2, np.float64)  # eps, bound
    _sift(
        a[0], o, n, a[3], a[4], a[5],
        carray(pointer(a[6]), 3 * o, np.float32), carray(pointer(a[7]), 3 * n, np.float32),
        a[8], np.float32(real[0]), np.float32(real[1]), a[10], carray(pointer(a[11]), a[10], np.int64), a[12],
    )  # fmt: skip


@njit
def _run_sum(data):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    k = a[2]
    rows, cols = carray(pointer(a[7]), k, np.int32), carray(pointer(a[8]), k, np.int32)
    _sum_exactly(a[0], a[1], k, a[3], a[4], a[5], a[6], rows, cols, carray(pointer(a[9]), k, np.float64))


def measure(data):  # type: ignore[no-untyped-def]
    """t, n, x, pitch, top, square, columns of a block."""
    _run_measure(data)


def round_columns(data):  # type: ignore[no-untyped-def]
    """t, n, x, pitch, top, q, scale, lost, columns of a block."""
    _run_round(data)


def sift(data):  # type: ignore[no-untyped-def]
    """o, n, products, weight, stored, rows, columns, kind, (eps, bound), room, out, found."""
    _run_sift(data)


def sum_exactly(data):  # type: ignore[no-untyped-def]
    """t, k, dy, pitch, x, pitch, rows, cols, out."""
    _run_sum(data)
