"""Triton kernels that put tensors into float8, with a scale for each row or one for all, and transpose them.

A scale is what numbers were divided by, a power of two; the largest number of its row is then at most 448. Four rows
are transposed as one, in words of four bytes.
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
def _byte_of(value):
    """The bits of the nearest float8 (e4m3) as an integer, for numbers of at most 448 and NaN.

    Made without the type: a kernel that stored a converted number and also put it into a word of the transposed copy
    gave wrong bytes there on an H100, though the interpreter's were right.
    """
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 0x3C0
    below = (tl.abs(value) + 16384.0).to(
        tl.int32, bitcast=True
    ) - 0x46800000  # in units of 2^-9, the least number
    byte = tl.where(size < 0x3C800000, below, tl.minimum(normal, 0x7E))
    return tl.where(size > 0x7F800000, 0x7F, byte) | ((bits >> 24) & 0x80)


@triton.jit
def _copy_tile(
    x,
    quantized,
    words,
    inverses,
    first_row,
    first_column,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of ``x`` [rows, columns] times the inverse scales of its rows, row 4 w + i in the i-th, as bytes into
    ``quantized`` [rows, columns] and into ``words`` [columns, rows / 4]; rows are a multiple of 4."""
    word, column = tl.arange(0, ROWS // 4), tl.arange(0, COLUMNS)
    inside = (first_row + 4 * word < rows)[:, None] & (first_column + column < columns)[None, :]
    found = tl.zeros((ROWS // 4, COLUMNS), tl.int32)
    for i in tl.static_range(4):
        place = first_row * columns + first_column + (4 * word + i)[:, None] * columns + column[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        byte = _byte_of(value * inverses[i][:, None])
        tl.store(quantized + place, byte.to(tl.uint8), mask=inside)
        found |= byte << (8 * i)
    pitch = (rows // 4).to(tl.int64)
    target = words + first_column * pitch + first_row // 4
    tl.store(target + (column[:, None] * pitch + word[None, :]), tl.trans(found), mask=tl.trans(inside))


@triton.jit
def copy_rows(
    x,
    others,
    largest,
    quantized,
    words,
    scales,
    rows,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    WITH_OTHERS: tl.constexpr,
):
    """Rows of ``x`` [rows, COLUMNS] in float8 with a scale for each, and the same bytes transposed, in ``words``
    [COLUMNS, rows / 4]. WITH_OTHERS: ``largest`` becomes the largest product of a row's scale and that in ``others``.

    A program reads its rows twice, the second time from a cache.
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    word, column = tl.arange(0, ROWS // 4), tl.arange(0, PIECE)
    here = first_row + 4 * word < rows
    tops = ()
    for _ in tl.static_range(4):
        tops = tops + (tl.zeros((ROWS // 4, PIECE), tl.float32),)  # noqa: RUF005
    for first_column in range(0, COLUMNS, PIECE):
        inside = here[:, None] & (first_column + column < COLUMNS)[None, :]
        raised = ()
        for i in tl.static_range(4):
            place = first_row * COLUMNS + first_column + (4 * word + i)[:, None] * COLUMNS + column[None, :]
            value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            raised = raised + (tl.maximum(tops[i], tl.abs(value)),)  # noqa: RUF005
        tops = raised
    inverses = ()
    for i in tl.static_range(4):
        scale = _scale_of(tl.max(tops[i], axis=1))
        row = first_row + 4 * word + i
        tl.store(scales + row, scale, mask=here)
        inverses = inverses + (1 / scale,)  # noqa: RUF005
        if WITH_OTHERS:
            both = scale * tl.load(others + row, mask=here, other=0.0)
            _raise_to(largest, tl.max(tl.where(here, both, 0.0), axis=0))
    for first_column in range(0, COLUMNS, PIECE):
        _copy_tile(x, quantized, words, inverses, first_row, first_column, rows, COLUMNS, ROWS, PIECE)


@triton.jit
def _raise_to_largest(x, largest, block, count, BLOCK: tl.constexpr):
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index, mask=index < count, other=0.0).to(tl.float32)
    _raise_to(largest, tl.max(tl.abs(value), axis=0))


@triton.jit
def largest_of_tokens(key, value, largest, key_count, value_count, BLOCK: tl.constexpr):
    """The largest absolute values of both, into the first numbers of the rows of ``largest`` [2, 4]."""
    program, blocks = tl.program_id(0), tl.cdiv(key_count, BLOCK)
    if program < blocks:
        _raise_to_largest(key, largest, program, key_count, BLOCK)
    else:
        _raise_to_largest(value, largest + 4, program - blocks, value_count, BLOCK)


@triton.jit
def _copy_matrix(
    x, largest, scale, quantized, words, tile, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One tile of a matrix with one scale, which goes into ``scale``."""
    across = tl.cdiv(columns, COLUMNS)
    of_all = _scale_of(tl.load(largest))
    tl.store(scale, of_all)
    inverse = tl.full((ROWS // 4,), 1.0, tl.float32) / of_all
    inverses = (inverse, inverse, inverse, inverse)
    first_row, first_column = (tile // across).to(tl.int64) * ROWS, tile % across * COLUMNS
    _copy_tile(x, quantized, words, inverses, first_row, first_column, rows, columns, ROWS, COLUMNS)


@triton.jit
def copy_tokens(
    key,
    value,
    largest,
    scale,
    key_quantized,
    key_words,
    value_quantized,
    value_words,
    rows,
    key_columns,
    value_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Keys and values, [rows, columns] each, in float8 with one scale, which goes into the rows of ``scale`` [2, 4];
    and the same bytes transposed, in words [columns, rows / 4]."""
    program, tiles = tl.program_id(0), tl.cdiv(rows, ROWS) * tl.cdiv(key_columns, COLUMNS)
    if program < tiles:
        _copy_matrix(key, largest, scale, key_quantized, key_words, program, rows, key_columns, ROWS, COLUMNS)
    else:
        _copy_matrix(
            value,
            largest + 4,
            scale + 4,
            value_quantized,
            value_words,
            program - tiles,
            rows,
            value_columns,
            ROWS,
            COLUMNS,
        )


@triton.jit
def _byte(value, place: tl.constexpr):
    """A float8 as one of the four bytes of an integer."""
    return value.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * place)


@triton.jit
def transpose_rows(
    quantized, scales, others, largest, transposed, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """[p, rows, columns] to [p, columns, rows / 4] words of four float8, with one scale for all, ``largest`` [p, 4]:
    the largest product of a row's scale and that in ``others``, for which these rows stand in, too; rows are a
    multiple of 4. The last rows, which were written last, come first: a cache may still have them."""
    matrix = tl.program_id(2).to(tl.int64)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64) * ROWS
    first_column = tl.program_id(0).to(tl.int64) * COLUMNS
    word, column = tl.arange(0, ROWS // 4), tl.arange(0, COLUMNS)
    here = first_row + 4 * word < rows
    inside = here[:, None] & (first_column + column < columns)[None, :]
    source = quantized + (matrix * rows + first_row) * columns + first_column
    top = tl.load(largest + 4 * matrix)
    inverse = 1 / tl.where(top > 0, top, 1.0)
    words = tl.zeros((ROWS // 4, COLUMNS), tl.int32)
    for i in tl.static_range(4):
        row = 4 * word + i
        value = tl.load(source + (row[:, None] * columns + column[None, :]), mask=inside, other=0.0)
        of_row = matrix * rows + first_row + row
        factor = tl.load(scales + of_row, mask=here, other=0.0) * tl.load(
            others + of_row, mask=here, other=0.0
        )
        factor *= inverse
        words |= _byte(_rounded(value.to(tl.float32) * factor[:, None], quantized.dtype.element_ty), i)
    target = transposed + (matrix * columns + first_column) * (rows // 4) + first_row // 4
    tl.store(target + (column[:, None] * (rows // 4) + word[None, :]), tl.trans(words), mask=tl.trans(inside))
