"""Triton kernels that put tensors into float8: with a scale for each row, and as transposed copies with one for all.

A scale is what numbers were divided by, a power of two; the largest number of its row is then at most 448.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenformer.ops.pattention_float8_words_triton import columns_of, rescaled, rounded


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
def quantize_rows(x, quantized, scales, largest_scale, features, BLOCK: tl.constexpr):
    """One row of [rows, features]; ``largest_scale`` becomes the largest of all."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + row * features + column, mask=column < features, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(tl.abs(value), axis=0))
    result = rounded(value * (1 / scale), quantized.dtype.element_ty)
    tl.store(quantized + row * features + column, result, mask=column < features)
    tl.store(scales + row, scale)
    _raise_to(largest_scale, scale)


@triton.jit
def transpose_rows(
    quantized,
    scales,
    largest_scale,
    transposed,
    rows,
    columns,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[p, rows, columns / 4] words of float8 to [p, columns, rows / 4]; if ``SCALED``, from a scale for each row
    [p, rows] to the largest for all. Rows and columns are multiples of 16, so that four words are inside or not."""
    matrix = tl.program_id(2).to(tl.int64)
    first_row, first_column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    four, word = tl.arange(0, ROWS // 4), tl.arange(0, COLUMNS // 4)  # rows, a word of a row
    here = first_row + four // 4 * 16 < rows
    inside = here[:, None] & (first_column + word // 4 * 16 < columns)[None, :]
    step = columns // 4
    source = quantized + ((matrix * rows + first_row) * columns + first_column) // 4
    source += four[:, None] * columns + word[None, :]
    a = tl.load(source, mask=inside, other=0)
    b = tl.load(source + step, mask=inside, other=0)
    c = tl.load(source + 2 * step, mask=inside, other=0)
    d = tl.load(source + 3 * step, mask=inside, other=0)
    if SCALED:
        inverse = 1 / tl.load(largest_scale)
        scale = scales + matrix * rows + first_row + 4 * four
        a = rescaled(a, (tl.load(scale, mask=here, other=0.0) * inverse)[:, None])
        b = rescaled(b, (tl.load(scale + 1, mask=here, other=0.0) * inverse)[:, None])
        c = rescaled(c, (tl.load(scale + 2, mask=here, other=0.0) * inverse)[:, None])
        d = rescaled(d, (tl.load(scale + 3, mask=here, other=0.0) * inverse)[:, None])
    column = tl.arange(0, COLUMNS)
    target = transposed + ((matrix * columns + first_column) * rows + first_row) // 4
    target += column[:, None] * (rows // 4) + four[None, :]
    inside = (first_column + column < columns)[:, None] & here[None, :]
    tl.store(target, tl.trans(columns_of(a, b, c, d)), mask=inside)


@triton.jit
def find_largest(x, largest, count, BLOCK: tl.constexpr):
    """The largest absolute value of all."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index, mask=index < count, other=0.0).to(tl.float32)
    _raise_to(largest, tl.max(tl.abs(value), axis=0))


@triton.jit
def quantize_tokens(tokens, largest, scale_of_all, quantized, count, BLOCK: tl.constexpr):
    """``count`` numbers in float8 with one scale.

    Only one thing is done with a rounded number: a kernel that stored it and also put it into a word of the transposed
    copy gave wrong bytes there on an H100, though the interpreter's were right.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = _scale_of(tl.load(largest))
    value = tl.load(tokens + index, mask=index < count, other=0.0).to(tl.float32)
    result = rounded(value * (1 / scale), quantized.dtype.element_ty)
    tl.store(quantized + index, result, mask=index < count)
    tl.store(scale_of_all, scale)
