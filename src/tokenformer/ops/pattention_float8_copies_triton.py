"""Triton kernels that put tensors into float8: with a scale for each row, and as transposed copies with one for all.

A scale is what numbers were divided by, a power of two; the largest number of its row is then at most 448.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _scale_of(largest):
    """For numbers of at most this absolute value: a 448th of it, rounded up to a power of two in its bits. Of zeros a
    tiny one, so that a row of them does not make the largest scale of all rows larger."""
    bits = (tl.maximum(largest, 1e-30) * (1 / 448)).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _raise_to(largest, value):
    """Make ``largest`` at least ``value``; where it is already, as nearly always, at the cost of a look."""
    tl.atomic_max(largest, value, mask=value > tl.load(largest), sem="relaxed")


@triton.jit
def _rounded(value, FLOAT8: tl.constexpr):
    """To the nearest float8. The interpreter loses a carry there (31.9 becomes 16), so it gets numbers of four bits."""
    if INTERPRETED:
        shifted = value * 1048577.0  # 2^20 + 1 (Veltkamp)
        value = shifted - (shifted - value)
    return value.to(FLOAT8)


@triton.jit
def quantize_rows(x, quantized, scales, largest_scale, features, BLOCK: tl.constexpr):
    """One row of [rows, features]; ``largest_scale`` becomes the largest of all."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * features + column, mask=column < features, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(tl.abs(value), axis=0))
    result = _rounded(value * (1 / scale), quantized.dtype.element_ty)
    tl.store(quantized + row * features + column, result, mask=column < features)
    tl.store(scales + row, scale)
    _raise_to(largest_scale, scale)


@triton.jit
def _byte(value, place: tl.constexpr):
    """A float8 as one of the four bytes of an integer. Four rows are transposed as one, in words."""
    return value.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * place)


@triton.jit
def transpose_rows(
    quantized, scales, largest_scale, transposed, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """[p, rows, columns] with a scale for each row to [p, columns, rows / 4] words of four float8, with the largest
    scale for all; rows are a multiple of 4."""
    matrix = tl.program_id(2).to(tl.int64)
    first_row, first_column = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64) * COLUMNS
    word, column = tl.arange(0, ROWS // 4), tl.arange(0, COLUMNS)
    here = first_row + 4 * word < rows
    inside = here[:, None] & (first_column + column < columns)[None, :]
    source = quantized + (matrix * rows + first_row) * columns + first_column
    inverse = 1 / tl.load(largest_scale)
    words = tl.zeros((ROWS // 4, COLUMNS), tl.int32)
    for i in tl.static_range(4):
        row = 4 * word + i
        value = tl.load(source + (row[:, None] * columns + column[None, :]), mask=inside, other=0.0)
        factor = tl.load(scales + matrix * rows + first_row + row, mask=here, other=1.0) * inverse
        words |= _byte(_rounded(value.to(tl.float32) * factor[:, None], quantized.dtype.element_ty), i)
    target = transposed + (matrix * columns + first_column) * (rows // 4) + first_row // 4
    tl.store(target + (column[:, None] * (rows // 4) + word[None, :]), tl.trans(words), mask=tl.trans(inside))


@triton.jit
def find_largest(x, largest, count, BLOCK: tl.constexpr):
    """The largest absolute value of all."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index, mask=index < count, other=0.0).to(tl.float32)
    _raise_to(largest, tl.max(tl.abs(value), axis=0))


@triton.jit
def quantize_tokens(tokens, largest, scale_of_all, scales, quantized, n, count, BLOCK: tl.constexpr):
    """``count`` numbers of n rows in float8 with one scale, which ``scales`` [n] repeats for :func:`transpose_rows`.

    Only one thing is done with a rounded number: a kernel that stored it and also put it into a word of the transposed
    copy gave wrong bytes there on an H100, though the interpreter's were right.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = _scale_of(tl.load(largest))
    value = tl.load(tokens + index, mask=index < count, other=0.0).to(tl.float32)
    result = _rounded(value * (1 / scale), quantized.dtype.element_ty)
    tl.store(quantized + index, result, mask=index < count)
    tl.store(scales + index, tl.full((BLOCK,), 1.0, tl.float32) * scale, mask=index < n)
    tl.store(scale_of_all, scale)
