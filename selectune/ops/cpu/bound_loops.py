"""The CPU's loops for bounds on a weight gradient: columns measured and rounded, entries that may score enough."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from selectune.ops.cpu.passes import GROUP, _widen
from selectune.ops.cpu.vectors import FLOAT32, fetch_add, pointer

COLUMNS = 256  # of an operand, at least, measured or rounded at once
ROWS = 16  # of a product, filtered at once
SPREAD = 16  # entries of which the best is found
ENTRIES = 512  # summed at once
SHIFT = 19  # bits of a float32 below those that say which bounds on a weight's factor hold
BINS = 1 << (31 - SHIFT)
TINY = np.float32(1e-30)  # a column below it is all error
LEVELS = np.float32(127)
SIZE = np.uint32(0x7FFFFFFF)  # all bits of a float32 but the sign
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
def _far(q, near, right, lost, full, a, c, floor):  # type: ignore[no-untyped-def]
    """Whether no entry of a group can reach `floor`, the least that any weight asks of |g|."""
    count = np.int32(0)
    for j in range(GROUP):
        most = abs(np.float32(q[j])) * (near * right[j]) + a * lost[j] + c * full[j]
        count += np.int32(0) if most < floor else np.int32(1)
    return count == 0


@njit(error_model="numpy")
def _asked(bits, needed):  # type: ignore[no-untyped-def]
    """The least that the weights of a group ask of |g|.

    What a weight asks for rises or falls with |w|, so it is least at the smallest or at the largest of them.
    """
    low, high = SIZE, np.uint32(0)
    for j in range(GROUP):
        size = bits[j] & SIZE
        low, high = min(low, size), max(high, size)
    return min(needed[low >> np.uint32(SHIFT)], needed[high >> np.uint32(SHIFT)])


@njit(error_model="numpy")
def _sift(counter, o, n, q, weight, stored, rows, columns, needed, floor, room, out, found):  # type: ignore[no-untyped-def]
    """Entries of (o, n) whose bound on |g| reaches what their weights ask for; all are counted, `room` are kept.

    `rows`: scale, norm, lost of the rows, one behind the other; `columns`: the same of the columns. `needed`: what |g|
    must reach, by the leading bits of |w|; `floor`: the least of it, so most groups end with their weights unread.
    """
    w = np.empty(n, np.float32)
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
                whole = end - begin == GROUP
                if whole and _far(values[part], near, right[part], lost[part], full[part], a, c, floor):
                    continue
                if not known:
                    w = _row(weight, stored, i, n, w)
                    known = True
                bits = w.view(np.uint32)
                if whole:
                    least = _asked(bits[part], needed)
                    if _far(values[part], near, right[part], lost[part], full[part], a, c, least):
                        continue
                for j in range(begin, end):
                    most = abs(np.float32(values[j])) * (near * right[j]) + a * lost[j] + c * full[j]
                    if not (most < needed[(bits[j] & SIZE) >> np.uint32(SHIFT)]):
                        place = fetch_add(found, 1)
                        if place < room:
                            out[place] = i * n + j


@njit(error_model="numpy")
def _row(weight, stored, i, n, w):  # type: ignore[no-untyped-def]
    """Row i of the weights as float32, in `w` unless it lies so in memory."""
    if stored == FLOAT32:
        return carray(pointer(weight + i * n * 4), n, np.float32)
    _widen(weight, stored, i * n, n, w)
    return w


@njit(error_model="numpy")
def _reach(counter, o, n, q, weight, stored, rows, columns, worth, keep, out):  # type: ignore[no-untyped-def]
    """The best lower bound on a score among every SPREAD entries of a row of (o, n).

    `worth`: the least that a weight multiplies |g| by, by the leading bits of |w|; `keep`: below 1 by more than
    rounding can add. A bound that is not a number counts as none.
    """
    w, low = np.empty(n, np.float32), np.empty(n, np.float32)
    right, lost, full = columns[:n], columns[2 * n :], columns[n : 2 * n]
    groups = -(-n // SPREAD)
    while True:
        first = fetch_add(counter, 1) * ROWS
        if first >= o:
            return
        for i in range(first, min(o, first + ROWS)):
            near, a, c = rows[i], rows[o + i] + rows[2 * o + i], rows[2 * o + i]
            values = carray(pointer(q + i * n * 4), n, np.int32)
            w = _row(weight, stored, i, n, w)
            bits = w.view(np.uint32)
            for j in range(n):
                least = abs(np.float32(values[j])) * (near * right[j]) * keep - (a * lost[j] + c * full[j])
                low[j] = least * worth[(bits[j] & SIZE) >> np.uint32(SHIFT)]
            for g in range(groups):
                best = np.float32(0)
                for j in range(g * SPREAD, min(n, (g + 1) * SPREAD)):
                    best = low[j] if low[j] > best else best
                out[i * groups + g] = best


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
            left = carray(pointer(dy + r * dy_pitch * 4), dy_pitch, np.float32)
            right = carray(pointer(x + r * x_pitch * 4), x_pitch, np.float32)
            for e in range(last - first):
                total[e] += np.float64(left[rows[first + e]]) * np.float64(right[cols[first + e]])


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
    _sift(
        a[0], o, n, a[3], a[4], a[5],
        carray(pointer(a[6]), 3 * o, np.float32), carray(pointer(a[7]), 3 * n, np.float32),
        carray(pointer(a[8]), BINS, np.float32), carray(pointer(a[9]), 1, np.float32)[0],
        a[10], carray(pointer(a[11]), a[10], np.int64), a[12],
    )  # fmt: skip


@njit
def _run_reach(data):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    o, n = a[1], a[2]
    _reach(
        a[0], o, n, a[3], a[4], a[5],
        carray(pointer(a[6]), 3 * o, np.float32), carray(pointer(a[7]), 3 * n, np.float32),
        carray(pointer(a[8]), BINS, np.float32), carray(pointer(a[9]), 1, np.float32)[0],
        carray(pointer(a[10]), o * -(-n // SPREAD), np.float32),
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
    """o, n, products, weight, stored, rows, columns, needed, floor, room, out, found."""
    _run_sift(data)


def reach(data):  # type: ignore[no-untyped-def]
    """o, n, products, weight, stored, rows, columns, worth, keep, out."""
    _run_reach(data)


def sum_exactly(data):  # type: ignore[no-untyped-def]
    """t, k, dy, pitch, x, pitch, rows, cols, out."""
    _run_sum(data)
