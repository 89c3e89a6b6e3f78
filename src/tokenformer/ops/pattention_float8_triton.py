"""Triton kernels of Pattention in float8: tensors with a scale for each row, transposed copies with one scale for all,
and the passes over the scores, which give weights and gradients in float8.

A scale is what numbers were divided by, a power of two; the largest number of its row is then at most 448.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from tokenformer.ops.pattention_triton import _row_norm, _row_softmax
from tokenformer.ops.pattention_triton_math import (
    GELU,
    SOFTMAX,
    backward_terms,
    before_statistics,
    row_factor,
    score_gradient,
    weight_of,
)

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


@triton.jit
def forward_to_float8(
    scores,
    input_scales,
    weights,
    weight_scales,
    largest_scale,
    statistics,
    rows,
    n,
    root,
    tau,
    eps,
    KIND: tl.constexpr,
    TANH: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Weights [p, rows, n] of ``scores`` [rows, p, n], which are in the scales of the input rows, and ``statistics``
    [rows, p, 2]; the grid is (programs, p)."""
    projection, projections = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < rows
    source, place = row * projections + projection, row + projection.to(tl.int64) * rows
    input_scale = tl.load(input_scales + row, mask=there, other=1.0)
    missing: tl.constexpr = float("-inf") if KIND == SOFTMAX else 0.0
    parts = ()
    for i in tl.static_range(PIECES):
        column = i * PIECE + tl.arange(0, PIECE)[None, :]
        inside = there if EVEN else there & (column < n)
        score = tl.load(scores + source * n + column, mask=inside, other=missing).to(tl.float32) * input_scale
        parts = parts + (before_statistics(score, KIND, TANH, EXACT),)  # noqa: RUF005
    first = tl.full((ROWS, 1), 1.0, tl.float32)
    second = first
    if KIND == SOFTMAX:
        first, second = _row_softmax(parts, PIECES)
    elif KIND != GELU:
        first, second = _row_norm(parts, PIECES)
    factor = row_factor(first, second, root, tau, eps, KIND)
    found = ()
    largest = tl.zeros((ROWS, PIECE), tl.float32)
    for i in tl.static_range(PIECES):
        weight = weight_of(parts[i], first, factor, KIND, TANH, EXACT)
        largest = tl.maximum(largest, tl.abs(weight))
        found = found + (weight,)  # noqa: RUF005
    scale = _scale_of(tl.max(largest, axis=1, keep_dims=True))
    inverse = 1 / scale
    for i in tl.static_range(PIECES):
        column = i * PIECE + tl.arange(0, PIECE)[None, :]
        inside = there if EVEN else there & (column < n)
        result = _rounded(found[i] * inverse, weights.dtype.element_ty)
        tl.store(weights + place * n + column, result, mask=inside)
    tl.store(weight_scales + place, scale, mask=there)
    _raise_to(largest_scale, tl.max(tl.where(there, scale, 0.0)))
    if KIND != GELU:
        tl.store(statistics + source * 2, first, mask=there)
        tl.store(statistics + source * 2 + 1, second, mask=there)


@triton.jit
def backward_to_float8(
    scores,
    input_scales,
    weight_grads,
    grad_scales,
    score_grads,
    score_grad_scales,
    largest_scale,
    statistics,
    rows,
    n,
    root,
    tau,
    eps,
    KIND: tl.constexpr,
    TANH: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    PROJECTIONS: tl.constexpr,
):
    """Gradient of ``scores`` [rows, p, n] from that of the weights [p, rows, n], whose rows are in ``grad_scales``
    [p, rows]; the p rows of an input row share their scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < rows
    input_scale = tl.load(input_scales + row, mask=there, other=1.0)
    missing: tl.constexpr = float("-inf") if KIND == SOFTMAX else 0.0
    found = ()
    largest = tl.zeros((ROWS, PIECE), tl.float32)
    for p in tl.static_range(PROJECTIONS):
        source, place = row * PROJECTIONS + p, row + p * rows.to(tl.int64)
        grad_scale = tl.load(grad_scales + place, mask=there, other=0.0)
        first = tl.full((ROWS, 1), 1.0, tl.float32)
        second = first
        if KIND != GELU:
            first = tl.load(statistics + source * 2, mask=there, other=1.0)
            second = tl.load(statistics + source * 2 + 1, mask=there, other=1.0)
        factor = row_factor(first, second, root, tau, eps, KIND)
        along = tl.zeros((ROWS, PIECE), tl.float32)
        kept = ()
        for i in tl.static_range(PIECES):
            column = i * PIECE + tl.arange(0, PIECE)[None, :]
            inside = there if EVEN else there & (column < n)
            score = tl.load(scores + source * n + column, mask=inside, other=missing).to(tl.float32)
            grad = tl.load(weight_grads + place * n + column, mask=inside, other=0.0).to(tl.float32)
            _, y, grad, slope = backward_terms(
                score * input_scale, grad * grad_scale, first, factor, KIND, TANH, EXACT
            )
            along += y * grad
            kept = kept + ((y, grad, slope),)  # noqa: RUF005
        total = tl.sum(along, axis=1, keep_dims=True)
        for i in tl.static_range(PIECES):
            y, grad, slope = kept[i]
            grad = score_gradient(y, grad, slope, total, first, second, factor, root, tau, KIND)
            largest = tl.maximum(largest, tl.where(there, tl.abs(grad), 0.0))
            found = found + (grad,)  # noqa: RUF005
    scale = _scale_of(tl.max(largest, axis=1, keep_dims=True))
    inverse = 1 / scale
    for p in tl.static_range(PROJECTIONS):
        for i in tl.static_range(PIECES):
            column = i * PIECE + tl.arange(0, PIECE)[None, :]
            inside = there if EVEN else there & (column < n)
            result = _rounded(found[p * PIECES + i] * inverse, score_grads.dtype.element_ty)
            tl.store(score_grads + (row * PROJECTIONS + p) * n + column, result, mask=inside)
    tl.store(score_grad_scales + row, scale, mask=there)
    _raise_to(largest_scale, tl.max(tl.where(there, scale, 0.0)))
