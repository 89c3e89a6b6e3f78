"""Triton kernels that put tensors into float8: with a scale for each row, and as transposed copies with one for all.

A scale is what numbers were divided by, a power of two; the largest number of its row is then at most 448.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenformer.ops.pattention_float8_words_triton import columns_of, four_rounded, rescaled, rounded


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
def quantize_rows(first, second, third, quantized, scales, largest_scale, features, BLOCK: tl.constexpr):
    """One row of up to three tensors [rows, features], to [tensors, rows, features]; ``largest_scale`` becomes the
    largest of all. The grid is (rows, tensors)."""
    tensor, row = tl.program_id(1), tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.where(tensor == 0, first, tl.where(tensor == 1, second, third))
    value = tl.load(x + row * features + column, mask=column < features, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(tl.abs(value), axis=0))
    result = rounded(value * (1 / scale), quantized.dtype.element_ty)
    place = tensor.to(tl.int64) * tl.num_programs(0) + row
    tl.store(quantized + place * features + column, result, mask=column < features)
    tl.store(scales + place, scale)
    _raise_to(largest_scale, scale)


@triton.jit
def _four_rows(source, inside, step):
    """Words at ``source``, of every fourth row, and of the three rows after it, ``step`` words apart."""
    return (
        tl.load(source, mask=inside, other=0),
        tl.load(source + step, mask=inside, other=0),
        tl.load(source + 2 * step, mask=inside, other=0),
        tl.load(source + 3 * step, mask=inside, other=0),
    )


@triton.jit
def _store_columns(target, a, b, c, d, rows, columns, first_row, first_column):
    """Store rows a, b, c, d of every four, words of a tile [tile rows / 4, tile columns / 4], in the transposed copy
    [columns, rows / 4] at ``target``, where the tile's first column begins."""
    four, column = tl.arange(0, a.shape[0]), tl.arange(0, 4 * a.shape[1])
    target += column[:, None] * (rows // 4) + four[None, :]
    inside = (first_column + column < columns)[:, None] & (first_row + four // 4 * 16 < rows)[None, :]
    tl.store(target, tl.trans(columns_of(a, b, c, d)), mask=inside)


@triton.jit
def _transpose_tile(
    tile,
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
    """A tile of columns of :func:`transpose_rows`."""
    matrix = tl.program_id(2).to(tl.int64)
    first_row, first_column = tl.program_id(0) * ROWS, tile * COLUMNS
    four, word = tl.arange(0, ROWS // 4), tl.arange(0, COLUMNS // 4)  # rows, a word of a row
    here = first_row + four // 4 * 16 < rows
    inside = here[:, None] & (first_column + word // 4 * 16 < columns)[None, :]
    source = quantized + ((matrix * rows + first_row) * columns + first_column) // 4
    place = four[:, None] * columns + word[None, :]
    a, b, c, d = _four_rows(source + place, inside, columns // 4)
    if SCALED:
        inverse = 1 / tl.load(largest_scale)
        scale = scales + matrix * rows + first_row + 4 * four
        a = rescaled(a, (tl.load(scale, mask=here, other=0.0) * inverse)[:, None])
        b = rescaled(b, (tl.load(scale + 1, mask=here, other=0.0) * inverse)[:, None])
        c = rescaled(c, (tl.load(scale + 2, mask=here, other=0.0) * inverse)[:, None])
        d = rescaled(d, (tl.load(scale + 3, mask=here, other=0.0) * inverse)[:, None])
    target = transposed + ((matrix * columns + first_column) * rows + first_row) // 4
    _store_columns(target, a, b, c, d, rows, columns, first_row, first_column)


@triton.jit
def transpose_rows(
    first,
    first_scales,
    first_largest,
    first_transposed,
    first_columns,
    second,
    second_scales,
    second_largest,
    second_transposed,
    second_columns,
    rows,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[p, rows, columns / 4] words of float8 to [p, columns, rows / 4]; if ``SCALED``, from a scale for each row
    [p, rows] to the largest for all. Rows and columns are multiples of 16, so that four words are inside or not. The
    grid is (tiles of rows, tiles of columns of the first and, if there are two, of the second, p)."""
    tile = tl.program_id(1)
    tiles = tl.cdiv(first_columns, COLUMNS)
    if tile < tiles:
        _transpose_tile(
            tile,
            first,
            first_scales,
            first_largest,
            first_transposed,
            rows,
            first_columns,
            SCALED,
            ROWS,
            COLUMNS,
        )
    else:
        _transpose_tile(
            tile - tiles,
            second,
            second_scales,
            second_largest,
            second_transposed,
            rows,
            second_columns,
            SCALED,
            ROWS,
            COLUMNS,
        )


@triton.jit
def find_largest(
    keys, values, largest, table, key_count, value_count, BLOCK: tl.constexpr, TABLE: tl.constexpr
):
    """The largest absolute values of blocks, [2, blocks] for the two; the grid is (blocks of the longer, 2). Makes the
    table zeros too, for those who come after."""
    block, which = tl.program_id(0), tl.program_id(1)
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tokens, count = tl.where(which == 0, keys, values), tl.where(which == 0, key_count, value_count)
    value = tl.load(tokens + index, mask=index < count, other=0.0).to(tl.float32)
    tl.store(largest + which * tl.num_programs(0) + block, tl.max(tl.abs(value), axis=0))
    if (block == 0) & (which == 0):
        tl.store(table + tl.arange(0, TABLE), tl.zeros((TABLE,), tl.float32))


@triton.jit
def _quantize_tile(
    tile,
    tokens,
    largest,
    scale_of_all,
    quantized,
    transposed,
    rows,
    columns,
    blocks,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of columns of :func:`quantize_tokens`.

    Both copies are of the same words: one that stored float8 of Triton's own conversion and also put them into words of
    the transposed copy gave wrong bytes there on an H100, though the interpreter's were right.
    """
    first_row, first_column = tl.program_id(0) * ROWS, tile * COLUMNS
    four, word = tl.arange(0, ROWS // 4), tl.arange(0, COLUMNS // 4)  # rows, a word of a row
    inside = (first_row + four // 4 * 16 < rows)[:, None] & (first_column + word // 4 * 16 < columns)[None, :]
    step = columns // 4
    start = (first_row.to(tl.int64) * columns + first_column) // 4
    place = four[:, None] * columns + word[None, :]
    a, b, c, d = _four_rows(tokens + start + place, inside, step)
    block = tl.arange(0, MOST)
    scale = _scale_of(tl.max(tl.load(largest + block, mask=block < blocks, other=0.0), axis=0))
    if (tl.program_id(0) == 0) & (tile == 0):
        tl.store(scale_of_all, scale)
    inverse = 1 / scale
    a, b = four_rounded(a, inverse), four_rounded(b, inverse)
    c, d = four_rounded(c, inverse), four_rounded(d, inverse)
    target = quantized + start + place
    tl.store(target, a, mask=inside)
    tl.store(target + step, b, mask=inside)
    tl.store(target + 2 * step, c, mask=inside)
    tl.store(target + 3 * step, d, mask=inside)
    target = transposed + (first_column.to(tl.int64) * rows + first_row) // 4
    _store_columns(target, a, b, c, d, rows, columns, first_row, first_column)


@triton.jit
def quantize_tokens(
    keys,
    key_largest,
    key_scale,
    key_quantized,
    key_transposed,
    key_columns,
    values,
    value_largest,
    value_scale,
    value_quantized,
    value_transposed,
    value_columns,
    rows,
    blocks,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Keys and values [rows, columns / 4], words of four bfloat16, in float8 with one scale for each of the two, from
    the largest [blocks] of each, as words [rows, columns / 4] and transposed [columns, rows / 4]; the grid is (tiles of
    rows, tiles of columns of both)."""
    tile = tl.program_id(1)
    tiles = tl.cdiv(key_columns, COLUMNS)
    if tile < tiles:
        _quantize_tile(
            tile,
            keys,
            key_largest,
            key_scale,
            key_quantized,
            key_transposed,
            rows,
            key_columns,
            blocks,
            MOST,
            ROWS,
            COLUMNS,
        )
    else:
        _quantize_tile(
            tile - tiles,
            values,
            value_largest,
            value_scale,
            value_quantized,
            value_transposed,
            rows,
            value_columns,
            blocks,
            MOST,
            ROWS,
            COLUMNS,
        )
