"""Numba intrinsics: addresses, an atomic counter, and a 16 x 16 transpose in registers.

They are plain LLVM IR without machine-specific instructions, so every processor that LLVM supports runs them. numba
keys its cache on disk by the file of the outermost function: after a change in this file, touch `loops` and `passes`.
The import of numba takes 0.5 s, so only the loops import this file, when a loop is first needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

ir: Any = cgutils.ir  # llvmlite, which comes with numba  # pyright: ignore[reportAttributeAccessIssue]

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)  # codes for the dtype of an operand

_I16, _I32, _I64, _F32, _F64 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer, which `numba.carray` takes."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


@intrinsic
def _fetch_add(typing: Any, address: Any, amount: Any) -> Any:
    """Add `amount` to the int64 at `address` in one atomic step; returns the value before."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        where = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", where, args[1], "monotonic")

    return types.int64(types.int64, types.int64), build


pointer: Any = _pointer  # typed as callers use them, without the typing context
fetch_add: Any = _fetch_add


def _full(value: int | float, kind: Any, lanes: int) -> Any:
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


def _widened(builder: Any, address: Any, stored: int, lanes: int) -> Any:
    """A row of `lanes` scalars as float32, or as float64 if they are stored as float64."""

    def load(kind: Any, align: int) -> Any:
        return builder.load(builder.inttoptr(address, ir.VectorType(kind, lanes).as_pointer()), align=align)

    floats = ir.VectorType(_F32, lanes)
    if stored == FLOAT64:
        return load(_F64, 8)
    if stored == FLOAT32:
        return load(_F32, 4)
    half = builder.zext(load(_I16, 2), ir.VectorType(_I32, lanes))
    if stored == BFLOAT16:
        return builder.bitcast(builder.shl(half, _full(16, _I32, lanes)), floats)
    # float16: shift exponent and fraction into place and scale by 2^112, which is exact for subnormals too
    size = builder.shl(builder.and_(half, _full(0x7FFF, _I32, lanes)), _full(13, _I32, lanes))
    number = builder.bitcast(builder.fmul(builder.bitcast(size, floats), _full(2.0**112, _F32, lanes)), size.type)
    special = builder.or_(size, _full(0x7F800000, _I32, lanes))  # infinity and NaN
    is_special = builder.icmp_unsigned(">=", size, _full(0x0F800000, _I32, lanes))
    sign = builder.shl(builder.and_(half, _full(0x8000, _I32, lanes)), _full(16, _I32, lanes))
    return builder.bitcast(builder.or_(builder.select(is_special, special, number), sign), floats)


def _transposed(builder: Any, rows: list[Any], lanes: int) -> list[Any]:
    """log2(lanes) rounds that swap off-diagonal blocks of 1, 2, 4, ... lanes."""
    distance = 1
    while distance < lanes:
        low = [n if not n & distance else n - distance + lanes for n in range(lanes)]
        high = [n + distance if not n & distance else n + lanes for n in range(lanes)]
        masks = [ir.Constant(ir.VectorType(_I32, lanes), mask) for mask in (low, high)]
        swapped = list(rows)
        for r in range(lanes):
            if not r & distance:
                pair = rows[r], rows[r + distance]
                swapped[r], swapped[r + distance] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        rows, distance = swapped, 2 * distance
    return rows


def _square(stored: int, lanes: int) -> Any:
    @intrinsic
    def transpose(typing: Any, source: Any, source_pitch: Any, target: Any, target_pitch: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, source_pitch, target, target_pitch = args

            def at(base: Any, pitch: Any, row: int) -> Any:
                return builder.add(base, builder.mul(pitch, ir.Constant(_I64, row)))

            rows = [_widened(builder, at(source, source_pitch, r), stored, lanes) for r in range(lanes)]
            align = 8 if stored == FLOAT64 else 4
            for r, row in enumerate(_transposed(builder, rows, lanes)):
                builder.store(row, builder.inttoptr(at(target, target_pitch, r), row.type.as_pointer()), align=align)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), build

    return transpose


# (source address, bytes between its rows, target address, bytes between its rows)
square_float32 = _square(FLOAT32, 16)
square_bfloat16 = _square(BFLOAT16, 16)
square_float16 = _square(FLOAT16, 16)
square_float64 = _square(FLOAT64, 8)


@njit(inline="always")
def float16_bits_to_float32_bits(half):  # type: ignore[no-untyped-def]
    """float16 bits (uint16) -> float32 bits (uint32), exact."""
    half = np.uint32(half)
    sign = (half & np.uint32(0x8000)) << np.uint32(16)
    size = half & np.uint32(0x7FFF)
    if size >= np.uint32(0x7C00):
        return sign | np.uint32(0x7F800000) | (size & np.uint32(0x3FF)) << np.uint32(13)
    if size >= np.uint32(0x400):
        return sign | ((size << np.uint32(13)) + np.uint32(112 << 23))
    if size == np.uint32(0):
        return sign
    exponent = np.uint32(113)
    while not size & np.uint32(0x400):
        size <<= np.uint32(1)
        exponent -= np.uint32(1)
    return sign | exponent << np.uint32(23) | (size & np.uint32(0x3FF)) << np.uint32(13)


@njit(inline="always")
def float32_bits_to_bfloat16_bits(bits):  # type: ignore[no-untyped-def]
    """float32 bits (uint32) -> bfloat16 bits, to nearest, ties to even."""
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(inline="always")
def float32_bits_to_float16_bits(bits):  # type: ignore[no-untyped-def]
    """float32 bits (uint32) -> float16 bits, to nearest, ties to even."""
    sign = np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000))
    size = bits & np.uint32(0x7FFFFFFF)
    if size > np.uint32(0x7F800000):
        return np.uint16(sign | np.uint16(0x7E00))
    if size >= np.uint32(0x477FF000):  # 65520: the smallest that rounds beyond the largest
        return np.uint16(sign | np.uint16(0x7C00))
    if size >= np.uint32(0x38800000):  # 2^-14: the smallest normal
        size = size - np.uint32(112 << 23) + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))
        return np.uint16(sign | np.uint16(size >> np.uint32(13)))
    if size < np.uint32(0x33000000):  # 2^-25: below half of the smallest subnormal
        return sign
    shift = np.uint32(126) - (size >> np.uint32(23))  # 14 ... 24
    whole = (size & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
    down = whole >> shift
    rest = whole & ((np.uint32(1) << shift) - np.uint32(1))
    half = np.uint32(1) << (shift - np.uint32(1))
    if rest > half or (rest == half and down & np.uint32(1)):
        down += np.uint32(1)
    return np.uint16(sign | np.uint16(down))
