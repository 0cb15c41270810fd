"""The CPU's one-pass loops over a tensor or a vector: scoring with a cutoff, scattering, the Adam step, drawing."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from selectune.ops.cpu.vectors import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    fetch_add,
    float16_bits_to_float32_bits,
    float32_bits_to_bfloat16_bits,
    float32_bits_to_float16_bits,
    pointer,
)
from selectune.seeds import FIRST, SECOND, STEP

BLOCK = 4096  # entries scored at once
GROUP = 64  # entries that are rejected together
SPAN = 16384  # slots written or stepped at once
SUMMED = 1 << 17  # entries of a checksum


@njit(error_model="numpy")
def _widen(address, stored, first, n, out):  # type: ignore[no-untyped-def]
    """out[:n] = n scalars from number `first` on, as out's dtype."""
    if stored == FLOAT32:
        single = carray(pointer(address + first * 4), n, np.float32)
        for j in range(n):
            out[j] = single[j]
    elif stored == FLOAT64:
        double = carray(pointer(address + first * 8), n, np.float64)
        for j in range(n):
            out[j] = double[j]
    else:
        half = carray(pointer(address + first * 2), n, np.uint16)
        if stored == BFLOAT16:
            for j in range(n):
                out[j] = np.uint32(np.uint32(half[j]) << np.uint32(16)).view(np.float32)
        else:
            for j in range(n):
                out[j] = np.uint32(float16_bits_to_float32_bits(half[j])).view(np.float32)


@njit(inline="always", error_model="numpy")
def _bottom(kind, w, exp, eps):  # type: ignore[no-untyped-def]
    """The divisor of |g|; kind 0 has none."""
    size = abs(w) + eps
    if kind == 2:
        return size * size
    if kind == 1:
        return size
    return size**exp


@njit(error_model="numpy")
def _near(kind, w, g, eps, bound, slack):  # type: ignore[no-untyped-def]
    """How many entries of a group may reach the cutoff or are NaN. It multiplies instead of dividing; never too few."""
    count = np.int32(0)
    if kind == 0:
        for j in range(GROUP):
            count += np.int32(0) if abs(g[j]) < bound - slack else np.int32(1)
    elif kind == 1:
        for j in range(GROUP):
            count += np.int32(0) if abs(g[j]) < (abs(w[j]) + eps) * bound - slack else np.int32(1)
    elif kind == 4:
        for j in range(GROUP):
            count += np.int32(0) if bound < abs(w[j]) < np.inf else np.int32(1)
    else:
        for j in range(GROUP):
            size = abs(w[j]) + eps
            count += np.int32(0) if abs(g[j]) < size * size * bound - slack else np.int32(1)
    return count


@njit(error_model="numpy")
def _small_of_block(w, n, cutoff, positions, scores, dtype):  # type: ignore[no-untyped-def]
    """`_of_block` for the score -|w|."""
    bound, zero = dtype(-cutoff), dtype(0)
    count, finite = 0, True
    for first in range(0, n, GROUP):
        last = min(n, first + GROUP)
        if last - first == GROUP and _near(4, w[first:last], w[first:last], zero, bound, zero) == 0:
            continue
        for j in range(first, last):
            score = -abs(w[j])
            if score - score != zero:
                finite = False
            if np.float64(score) >= cutoff:
                positions[count] = j
                scores[count] = score
                count += 1
    return count if finite else -1 - count


@njit(error_model="numpy")
def _of_block(w, g, n, kind, exp, eps, cutoff, positions, scores, dtype):  # type: ignore[no-untyped-def]
    """Find the entries of one block that reach the cutoff; returns their count n, or -1 - n if one is not finite."""
    if kind == 4:
        return _small_of_block(w, n, cutoff, positions, scores, dtype)
    bound = dtype(cutoff * (1.0 - 1e-5)) if cutoff > 0 else dtype(-np.inf)
    slack, zero = dtype(1e-37), dtype(0)
    count, finite = 0, True
    for first in range(0, n, GROUP):
        last = min(n, first + GROUP)
        if kind != 3 and last - first == GROUP:
            if _near(kind, w[first:last], g[first:last], eps, bound, slack) == 0:
                continue
        for j in range(first, last):
            top = abs(g[j])
            bottom = dtype(1) if kind == 0 else _bottom(kind, w[j], exp, eps)
            if kind != 3 and top < bottom * bound - slack:
                continue
            score = top / bottom
            if not (score - score == zero):
                finite = False
            if np.float64(score) >= cutoff and score > zero:
                positions[count] = j
                scores[count] = score
                count += 1
    return count if finite else -1 - count


@njit(error_model="numpy")
def _filter(counter, n, weight, w_stored, gradient, g_stored, kind, exp, eps, cutoff, stage, state, counts, places,
            out_positions, out_scores, filling, dtype):  # type: ignore[no-untyped-def]  # fmt: skip
    """When scoring, count the candidates and put them on a stage with room; when filling, put them into their place."""
    w_block, g_block = np.empty(BLOCK, dtype), np.empty(BLOCK, dtype)
    local, scores = np.empty(BLOCK, np.int32), np.empty(BLOCK, dtype)
    blocks = (n + BLOCK - 1) // BLOCK
    wide = FLOAT64 if dtype is np.float64 else FLOAT32
    size = 8 if dtype is np.float64 else 4
    while True:
        block = fetch_add(counter, 1)
        if block >= blocks:
            return
        first = block * BLOCK
        here = min(BLOCK, n - first)
        if filling and (counts[block] == 0 or places[block] >= 0):
            start, place = counts[blocks + block], places[block]
            for j in range(counts[block]):
                out_positions[start + j] = stage[0][place + j]
                out_scores[start + j] = stage[1][place + j]
            continue
        w, g = w_block[:here], g_block[:here]
        if w_stored == wide:
            w = carray(pointer(weight + first * size), here, dtype)
        elif kind != 0:
            _widen(weight, w_stored, first, here, w)
        else:
            w[:] = dtype(0)
        if g_stored == wide:
            g = carray(pointer(gradient + first * size), here, dtype)
        else:
            _widen(gradient, g_stored, first, here, g)
        count = _of_block(w, g, here, kind, exp, eps, cutoff, local, scores, dtype)
        if count < 0:
            count = -1 - count
            state[1] = 1
        if filling:
            start = counts[blocks + block]
            for j in range(count):
                out_positions[start + j] = first + local[j]
                out_scores[start + j] = scores[j]
            continue
        place = fetch_add(state.ctypes.data, count)
        counts[block] = count
        places[block] = place if place + count <= stage[0].size else -1
        if places[block] >= 0:
            for j in range(count):
                stage[0][place + j] = first + local[j]
                stage[1][place + j] = scores[j]


@njit
def _run_filter(data, dtype):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    real = carray(pointer(a[7]), 3, np.float64)  # exp, eps, cutoff
    n, blocks, room, found = a[1], (a[1] + BLOCK - 1) // BLOCK, a[8], a[14]
    _filter(
        a[0], n, a[2], a[3], a[4], a[5], a[6], dtype(real[0]), dtype(real[1]), real[2],
        (carray(pointer(a[9]), room, np.int64), carray(pointer(a[10]), room, dtype)),
        carray(pointer(a[11]), 2, np.int64),
        carray(pointer(a[12]), 2 * blocks, np.int64), carray(pointer(a[13]), blocks, np.int64),
        carray(pointer(a[15]), found, np.int64), carray(pointer(a[16]), found, dtype), a[17] == 1, dtype,
    )  # fmt: skip


@njit(error_model="numpy")
def _scatter(counter, n, weight, stored, k, flat, values, total, slots, bad, dtype):  # type: ignore[no-untyped-def]
    while True:
        first = fetch_add(counter, 1) * SPAN
        if first >= k:
            return
        _scatter_span(first, min(k, first + SPAN), n, weight, stored, flat, values, total, slots, bad)


@njit(error_model="numpy")
def _scatter_span(first, last, n, weight, stored, flat, values, total, slots, bad):  # type: ignore[no-untyped-def]
    single, double = carray(pointer(weight), n, np.float32), carray(pointer(weight), n, np.float64)
    half = carray(pointer(weight), n, np.uint16)
    for j in range(first, last):
        at, slot = flat[j], slots[j]
        if at < 0 or at >= n or slot < 0 or slot >= total:
            bad[0] = 1
            continue
        value = values[slot]
        if stored == FLOAT32:
            single[at] = np.float32(value)
        elif stored == FLOAT64:
            double[at] = np.float64(value)
        elif stored == BFLOAT16:
            half[at] = float32_bits_to_bfloat16_bits(np.float32(value).view(np.uint32))
        else:
            half[at] = float32_bits_to_float16_bits(np.float32(value).view(np.uint32))


@njit
def _run_scatter(data, dtype):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    k, total = a[4], a[7]
    _scatter(
        a[0], a[1], a[2], a[3], k, carray(pointer(a[5]), k, np.int64), carray(pointer(a[6]), total, dtype), total,
        carray(pointer(a[8]), k, np.int64), carray(pointer(a[9]), 1, np.int64), dtype,
    )  # fmt: skip


@njit
def _run_scatter_many(data, dtype):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    count, total = a[1], a[4]
    table, values = carray(pointer(a[2]), (count, 6), np.int64), carray(pointer(a[3]), total, dtype)
    bad = carray(pointer(a[5]), 1, np.int64)
    while True:
        row = fetch_add(a[0], 1)
        if row >= count:
            return
        n, weight, stored, k = table[row, 0], table[row, 1], table[row, 2], table[row, 3]
        flat, slots = carray(pointer(table[row, 4]), k, np.int64), carray(pointer(table[row, 5]), k, np.int64)
        _scatter_span(0, k, n, weight, stored, flat, values, total, slots, bad)


@njit(error_model="numpy")
def _adamw(counter, values, gradient, m, v, ages, real, first_powers, second_powers, dtype):  # type: ignore[no-untyped-def]
    lr, beta1, beta2, eps = real[0], real[1], real[2], dtype(real[3])
    keep, rest1, rest2, keep2 = dtype(1 - lr * real[4]), dtype(1 - beta1), dtype(1 - beta2), dtype(beta2)
    step, root = dtype(lr / real[5]), dtype(np.sqrt(real[6]))
    one = dtype(1)
    shared, longest = ages.size == 0, first_powers.size - 1
    while True:
        first = fetch_add(counter, 1) * SPAN
        if first >= values.size:
            return
        last = min(values.size, first + SPAN)
        if shared:
            x, gs, ms, vs = values[first:last], gradient[first:last], m[first:last], v[first:last]
            for j in range(x.size):
                g = gs[j]
                new_m = ms[j] + rest1 * (g - ms[j])
                new_v = vs[j] * keep2 + rest2 * g * g
                ms[j] = new_m
                vs[j] = new_v
                x[j] = x[j] * keep - step * new_m / (np.sqrt(new_v) / root + eps)
            continue
        for j in range(first, last):
            g = gradient[j]
            if g == 0 and ages[j] == 0:
                continue  # the slot is empty, or has had no gradient yet
            ages[j] += 1
            age = min(longest, ages[j])
            m[j] += rest1 * (g - m[j])
            v[j] = v[j] * keep2 + rest2 * g * g
            own_step = dtype(lr) / (one - first_powers[age])
            own_root = np.sqrt(one - second_powers[age])
            values[j] = values[j] * keep - own_step * m[j] / (np.sqrt(v[j]) / own_root + eps)


@njit
def _run_adamw(data, dtype):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    n, aged, powers = a[1], a[6], a[9]
    _adamw(
        a[0], carray(pointer(a[2]), n, dtype), carray(pointer(a[3]), n, dtype), carray(pointer(a[4]), n, dtype),
        carray(pointer(a[5]), n, dtype), carray(pointer(a[7]), aged, np.int32), carray(pointer(a[8]), 7, np.float64),
        carray(pointer(a[10]), powers, dtype), carray(pointer(a[11]), powers, dtype), dtype,
    )  # fmt: skip


@njit
def _run_sum(data, dtype):  # type: ignore[no-untyped-def]
    a = carray(data, 32, np.int64)
    n, values = a[1], carray(pointer(a[2]), a[1], dtype)
    while True:
        first = fetch_add(a[0], 1) * SUMMED
        if first >= n:
            return
        found, weight, part = np.uint64(0), np.uint64(2 * first + 1), values[first : min(n, first + SUMMED)]
        for j in range(part.size):  # numba compiles this form to 32-bit products
            found += np.uint64(part[j]) * (weight & np.uint64(0xFFFFFFFF))
            weight += np.uint64(2)
        fetch_add(a[3], np.int64(found))


def filter_float32(data):  # type: ignore[no-untyped-def]
    _run_filter(data, np.float32)


def filter_float64(data):  # type: ignore[no-untyped-def]
    _run_filter(data, np.float64)


def scatter_float32(data):  # type: ignore[no-untyped-def]
    _run_scatter(data, np.float32)


def scatter_float64(data):  # type: ignore[no-untyped-def]
    _run_scatter(data, np.float64)


def scatter_many_float32(data):  # type: ignore[no-untyped-def]
    _run_scatter_many(data, np.float32)


def scatter_many_float64(data):  # type: ignore[no-untyped-def]
    _run_scatter_many(data, np.float64)


def adamw_float32(data):  # type: ignore[no-untyped-def]
    _run_adamw(data, np.float32)


def adamw_float64(data):  # type: ignore[no-untyped-def]
    _run_adamw(data, np.float64)


def sum_uint8(data):  # type: ignore[no-untyped-def]
    _run_sum(data, np.uint8)


def sum_int16(data):  # type: ignore[no-untyped-def]
    _run_sum(data, np.uint16)


def sum_int32(data):  # type: ignore[no-untyped-def]
    _run_sum(data, np.uint32)


def sum_int64(data):  # type: ignore[no-untyped-def]
    _run_sum(data, np.uint64)


# -- a stream of numbers: `seeds.uniform` in one pass, without a temporary

_STEP, _FIRST, _SECOND = np.uint64(STEP), np.uint64(FIRST), np.uint64(SECOND)


@njit(inline="always")
def _hashed(key, at):  # type: ignore[no-untyped-def]
    x = key + np.uint64(at + 1) * _STEP
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


@njit
def uniform_float32(key, first, out):  # type: ignore[no-untyped-def]
    """Fills out (n,) float32 with numbers in [0, 1) of 24 bits."""
    for j in range(out.size):
        out[j] = np.float32(np.int64(_hashed(key, first + j) >> np.uint64(40))) * np.float32(2.0**-24)


@njit
def uniform_float64(key, first, out):  # type: ignore[no-untyped-def]
    """Fills out (n,) float64 with numbers in [0, 1) of 53 bits."""
    for j in range(out.size):
        out[j] = np.float64(np.int64(_hashed(key, first + j) >> np.uint64(11))) * 2.0**-53
