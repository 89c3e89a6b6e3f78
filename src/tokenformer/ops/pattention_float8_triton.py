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
    """For numbers of at most this absolute value."""
    exponent = tl.ceil(tl.log2(tl.maximum(largest, 1e-30) * (1 / 448)))
    return tl.where(largest == 0, 1.0, tl.exp2(exponent))


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
def transpose_rows(
    quantized, scales, largest_scale, transposed, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """[rows, columns] with a scale for each row to [columns, rows] with the largest for all."""
    first_row, first_column = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64) * COLUMNS
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    here = first_row + row < rows
    inside = here[:, None] & (first_column + column < columns)[None, :]
    source = quantized + first_row * columns + first_column
    value = tl.load(source + (row[:, None] * columns + column[None, :]), mask=inside, other=0.0)
    factor = tl.load(scales + first_row + row, mask=here, other=1.0) / tl.load(largest_scale)
    result = _rounded(value.to(tl.float32) * factor[:, None], transposed.dtype.element_ty)
    target = transposed + first_column * rows + first_row
    tl.store(target + (column[:, None] * rows + row[None, :]), tl.trans(result), mask=tl.trans(inside))


@triton.jit
def find_largest(x, largest, count, BLOCK: tl.constexpr):
    """The largest absolute value of all."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index, mask=index < count, other=0.0).to(tl.float32)
    _raise_to(largest, tl.max(tl.abs(value), axis=0))


@triton.jit
def quantize_tokens(
    tokens,
    largest,
    scale_of_all,
    quantized,
    transposed,
    n,
    features,
    first,
    total,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A group of n tokens to the rows from ``first`` on of [total, features], and of its transpose."""
    first_row, first_column = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64) * COLUMNS
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (first_row + row < n)[:, None] & (first_column + column < features)[None, :]
    scale = _scale_of(tl.load(largest))
    offsets = row[:, None] * features + column[None, :]
    value = tl.load(tokens + first_row * features + first_column + offsets, mask=inside, other=0.0)
    result = _rounded(value.to(tl.float32) * (1 / scale), quantized.dtype.element_ty)
    first_row += first
    tl.store(quantized + first_row * features + first_column + offsets, result, mask=inside)
    target = transposed + first_column * total + first_row
    tl.store(target + (column[:, None] * total + row[None, :]), tl.trans(result), mask=tl.trans(inside))
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
    projections,
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
    """Weights [p, rows / p, n] of ``scores`` [rows, n], in which p rows come of each input row and are in its scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < rows
    input_row = row // projections
    place = (row % projections) * (rows // projections) + input_row
    input_scale = tl.load(input_scales + input_row, mask=there, other=1.0)
    missing: tl.constexpr = float("-inf") if KIND == SOFTMAX else 0.0
    parts = ()
    for i in tl.static_range(PIECES):
        column = i * PIECE + tl.arange(0, PIECE)[None, :]
        inside = there if EVEN else there & (column < n)
        score = tl.load(scores + row * n + column, mask=inside, other=missing).to(tl.float32) * input_scale
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
        tl.store(statistics + row * 2, first, mask=there)
        tl.store(statistics + row * 2 + 1, second, mask=there)


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
    projections,
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
    TOGETHER: tl.constexpr,
):
    """Gradient of ``scores`` [rows, n] from that of the weights [p, rows / p, n], whose rows are in ``grad_scales``
    [p, rows / p]; the p rows of an input row share their scale. ``TOGETHER`` (p > 1): a program takes these."""
    local = tl.arange(0, ROWS)[:, None]
    if TOGETHER:
        row = tl.program_id(0).to(tl.int64) * projections + local
        there = local < projections
    else:
        row = tl.program_id(0).to(tl.int64) * ROWS + local
        there = row < rows
    input_row = row // projections
    place = (row % projections) * (rows // projections) + input_row
    input_scale = tl.load(input_scales + input_row, mask=there, other=1.0)
    grad_scale = tl.load(grad_scales + place, mask=there, other=0.0)
    first = tl.full((ROWS, 1), 1.0, tl.float32)
    second = first
    if KIND != GELU:
        first = tl.load(statistics + row * 2, mask=there, other=1.0)
        second = tl.load(statistics + row * 2 + 1, mask=there, other=1.0)
    factor = row_factor(first, second, root, tau, eps, KIND)
    missing: tl.constexpr = float("-inf") if KIND == SOFTMAX else 0.0
    along = tl.zeros((ROWS, PIECE), tl.float32)
    kept = ()
    for i in tl.static_range(PIECES):
        column = i * PIECE + tl.arange(0, PIECE)[None, :]
        inside = there if EVEN else there & (column < n)
        score = tl.load(scores + row * n + column, mask=inside, other=missing).to(tl.float32) * input_scale
        grad = tl.load(weight_grads + place * n + column, mask=inside, other=0.0).to(tl.float32) * grad_scale
        _, y, grad, slope = backward_terms(score, grad, first, factor, KIND, TANH, EXACT)
        along += y * grad
        kept = kept + ((y, grad, slope),)  # noqa: RUF005
    total = tl.sum(along, axis=1, keep_dims=True)
    found = ()
    largest = tl.zeros((ROWS, PIECE), tl.float32)
    for i in tl.static_range(PIECES):
        y, grad, slope = kept[i]
        grad = score_gradient(y, grad, slope, total, first, second, factor, root, tau, KIND)
        largest = tl.maximum(largest, tl.where(there, tl.abs(grad), 0.0))
        found = found + (grad,)  # noqa: RUF005
    of_row = tl.max(largest, axis=1, keep_dims=True)
    if TOGETHER:
        of_row = tl.max(of_row, axis=0, keep_dims=True) + tl.zeros((ROWS, 1), tl.float32)
    scale = _scale_of(of_row)
    inverse = 1 / scale
    for i in tl.static_range(PIECES):
        column = i * PIECE + tl.arange(0, PIECE)[None, :]
        inside = there if EVEN else there & (column < n)
        result = _rounded(found[i] * inverse, score_grads.dtype.element_ty)
        tl.store(score_grads + row * n + column, result, mask=inside)
    tl.store(score_grad_scales + input_row, scale, mask=there)
    _raise_to(largest_scale, tl.max(tl.where(there, scale, 0.0)))
