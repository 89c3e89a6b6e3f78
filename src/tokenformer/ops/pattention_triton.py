"""Triton kernels between the products of Pattention: one pass over the scores in the forward, one in the backward.

A program takes a few whole rows of scores into registers, so that the row norm, the activation and, in the
backward, the weights again and the gradient of the scores cost each element one read and one write. Rows too long
for that are walked in blocks, twice. The function is
:func:`tokenformer.ops.pattention.attention_weights`, the guards included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenformer.ops.pattention_triton_math import (
    GELU,
    SOFTMAX,
    backward_terms,
    before_statistics,
    norm_of,
    row_factor,
    safe_squares,
    scale_of,
    score_gradient,
    weight_of,
)


@triton.jit
def _offsets(row, rows, n, first, PIECE: tl.constexpr, EVEN: tl.constexpr):
    """Offsets of a piece of these rows, and which of them exist."""
    column = first + tl.arange(0, PIECE)[None, :]
    inside = row < rows
    if not EVEN:
        inside = inside & (column < n)
    return row * n + column, inside


@triton.jit
def _row_norm(parts, PIECES: tl.constexpr):
    """(scale, norm of scale * row), [rows, 1] each; the scale is 1 where no square is lost without it, the norm
    infinite where the row is zero."""
    squares = parts[0] * parts[0]
    for i in tl.static_range(1, PIECES):
        squares += parts[i] * parts[i]
    total = tl.sum(squares, axis=1, keep_dims=True)
    safe = safe_squares(total)
    scale = tl.full(total.shape, 1.0, tl.float32)
    if tl.min(safe.to(tl.int32)) == 0:
        largest = tl.abs(parts[0])
        for i in tl.static_range(1, PIECES):
            largest = tl.maximum(largest, tl.abs(parts[i]))
        scale = tl.where(safe, 1.0, scale_of(tl.max(largest, axis=1, keep_dims=True)))
        squares = (parts[0] * scale) * (parts[0] * scale)
        for i in tl.static_range(1, PIECES):
            squares += (parts[i] * scale) * (parts[i] * scale)
        total = tl.sum(squares, axis=1, keep_dims=True)
    return scale, norm_of(total)


@triton.jit
def _row_softmax(parts, PIECES: tl.constexpr):
    """(largest score, sum of the exponentials below it), [rows, 1] each."""
    largest = parts[0]
    for i in tl.static_range(1, PIECES):
        largest = tl.maximum(largest, parts[i])
    first = tl.max(largest, axis=1, keep_dims=True)
    first = tl.where(first > float("-inf"), first, 0.0)  # rows that are not there
    total = tl.exp(parts[0] - first)
    for i in tl.static_range(1, PIECES):
        total += tl.exp(parts[i] - first)
    return first, tl.maximum(tl.sum(total, axis=1, keep_dims=True), 1.0)  # the largest alone gives 1


@triton.jit
def row_statistics(parts, KIND: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr):
    """The two figures of each row, [ROWS, 1] each, from what they are of; ones for GELU, which has none."""
    first = tl.full((ROWS, 1), 1.0, tl.float32)
    second = first
    if KIND == SOFTMAX:
        first, second = _row_softmax(parts, PIECES)
    elif KIND != GELU:
        first, second = _row_norm(parts, PIECES)
    return first, second


@triton.jit
def whole_forward(
    scores,
    weights,
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
    """Weights of ROWS rows; the last rows first, which the product wrote last."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    missing: tl.constexpr = float("-inf") if KIND == SOFTMAX else 0.0
    parts = ()
    for i in tl.static_range(PIECES):
        offsets, inside = _offsets(row, rows, n, i * PIECE, PIECE, EVEN)
        score = tl.load(scores + offsets, mask=inside, other=missing).to(tl.float32)
        parts = parts + (before_statistics(score, KIND, TANH, EXACT),)  # noqa: RUF005
    first, second = row_statistics(parts, KIND, ROWS, PIECES)
    factor = row_factor(first, second, root, tau, eps, KIND)
    for i in tl.static_range(PIECES):
        offsets, inside = _offsets(row, rows, n, i * PIECE, PIECE, EVEN)
        weight = weight_of(parts[i], first, factor, KIND, TANH, EXACT)
        tl.store(weights + offsets, weight.to(weights.dtype.element_ty), mask=inside)
    if KIND != GELU:
        tl.store(statistics + row * 2, first, mask=row < rows)
        tl.store(statistics + row * 2 + 1, second, mask=row < rows)


@triton.jit
def whole_backward(
    scores,
    weight_grads,
    weights,
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
    """Weights of ROWS rows again, and the gradient of their scores in place of ``weight_grads``."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first = tl.full((ROWS, 1), 1.0, tl.float32)
    second = first
    if KIND != GELU:
        first = tl.load(statistics + row * 2, mask=row < rows, other=1.0)
        second = tl.load(statistics + row * 2 + 1, mask=row < rows, other=1.0)
    factor = row_factor(first, second, root, tau, eps, KIND)
    missing: tl.constexpr = float("-inf") if KIND == SOFTMAX else 0.0
    along = tl.zeros((ROWS, PIECE), tl.float32)
    kept = ()
    for i in tl.static_range(PIECES):
        offsets, inside = _offsets(row, rows, n, i * PIECE, PIECE, EVEN)
        score = tl.load(scores + offsets, mask=inside, other=missing).to(tl.float32)
        grad = tl.load(weight_grads + offsets, mask=inside, other=0.0).to(tl.float32)
        weight, y, grad, slope = backward_terms(score, grad, first, factor, KIND, TANH, EXACT)
        tl.store(weights + offsets, weight.to(weights.dtype.element_ty), mask=inside)
        along += y * grad
        kept = kept + ((y, grad, slope),)  # noqa: RUF005
    total = tl.sum(along, axis=1, keep_dims=True)
    for i in tl.static_range(PIECES):
        offsets, inside = _offsets(row, rows, n, i * PIECE, PIECE, EVEN)
        y, grad, slope = kept[i]
        grad = score_gradient(y, grad, slope, total, first, second, factor, root, tau, KIND)
        tl.store(weight_grads + offsets, grad.to(weight_grads.dtype.element_ty), mask=inside)


@triton.jit
def long_forward(
    scores,
    weights,
    statistics,
    rows,
    n,
    root,
    tau,
    eps,
    KIND: tl.constexpr,
    TANH: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """:func:`whole_forward` of one row, block after block."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    missing: tl.constexpr = float("-inf") if KIND == SOFTMAX else 0.0
    first = tl.full((1, 1), 1.0, tl.float32)
    second = first
    if KIND != GELU:
        largest = tl.full((1, BLOCK), missing, tl.float32)
        squares = tl.zeros((1, BLOCK), tl.float32)
        for start in range(0, BLOCKS * BLOCK, BLOCK):
            offsets, inside = _offsets(row, rows, n, start, BLOCK, False)
            score = tl.load(scores + offsets, mask=inside, other=missing).to(tl.float32)
            part = before_statistics(score, KIND, TANH, EXACT)
            if KIND == SOFTMAX:
                largest = tl.maximum(largest, part)
            else:
                largest = tl.maximum(largest, tl.abs(part))
                squares += part * part
        top = tl.max(largest, axis=1, keep_dims=True)
        first = top
        if KIND != SOFTMAX:
            safe = safe_squares(tl.sum(squares, axis=1, keep_dims=True))
            first = tl.where(safe, 1.0, scale_of(top))
        total = tl.zeros((1, BLOCK), tl.float32)
        for start in range(0, BLOCKS * BLOCK, BLOCK):
            offsets, inside = _offsets(row, rows, n, start, BLOCK, False)
            score = tl.load(scores + offsets, mask=inside, other=missing).to(tl.float32)
            if KIND == SOFTMAX:
                total += tl.exp(score - first)
            else:
                part = before_statistics(score, KIND, TANH, EXACT) * first
                total += part * part
        second = tl.sum(total, axis=1, keep_dims=True)
        if KIND != SOFTMAX:
            second = norm_of(second)
        tl.store(statistics + row * 2, first)
        tl.store(statistics + row * 2 + 1, second)
    factor = row_factor(first, second, root, tau, eps, KIND)
    for start in range(0, BLOCKS * BLOCK, BLOCK):
        offsets, inside = _offsets(row, rows, n, start, BLOCK, False)
        score = tl.load(scores + offsets, mask=inside, other=missing).to(tl.float32)
        part = before_statistics(score, KIND, TANH, EXACT)
        weight = weight_of(part, first, factor, KIND, TANH, EXACT)
        tl.store(weights + offsets, weight.to(weights.dtype.element_ty), mask=inside)


@triton.jit
def long_backward(
    scores,
    weight_grads,
    weights,
    statistics,
    rows,
    n,
    root,
    tau,
    eps,
    KIND: tl.constexpr,
    TANH: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """:func:`whole_backward` of one row, block after block."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    first = tl.full((1, 1), 1.0, tl.float32)
    second = first
    if KIND != GELU:
        first = tl.load(statistics + row * 2)
        second = tl.load(statistics + row * 2 + 1)
    factor = row_factor(first, second, root, tau, eps, KIND)
    missing: tl.constexpr = float("-inf") if KIND == SOFTMAX else 0.0
    along = tl.zeros((1, BLOCK), tl.float32)
    if KIND != GELU:
        for start in range(0, BLOCKS * BLOCK, BLOCK):
            offsets, inside = _offsets(row, rows, n, start, BLOCK, False)
            score = tl.load(scores + offsets, mask=inside, other=missing).to(tl.float32)
            grad = tl.load(weight_grads + offsets, mask=inside, other=0.0).to(tl.float32)
            _, y, grad, _ = backward_terms(score, grad, first, factor, KIND, TANH, EXACT)
            along += y * grad
    total = tl.sum(along, axis=1, keep_dims=True)
    for start in range(0, BLOCKS * BLOCK, BLOCK):
        offsets, inside = _offsets(row, rows, n, start, BLOCK, False)
        score = tl.load(scores + offsets, mask=inside, other=missing).to(tl.float32)
        grad = tl.load(weight_grads + offsets, mask=inside, other=0.0).to(tl.float32)
        weight, y, grad, slope = backward_terms(score, grad, first, factor, KIND, TANH, EXACT)
        grad = score_gradient(y, grad, slope, total, first, second, factor, root, tau, KIND)
        tl.store(weights + offsets, weight.to(weights.dtype.element_ty), mask=inside)
        tl.store(weight_grads + offsets, grad.to(weight_grads.dtype.element_ty), mask=inside)
