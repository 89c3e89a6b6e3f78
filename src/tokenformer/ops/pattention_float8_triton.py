"""Triton kernels of Pattention in float8: the passes over the scores, which give weights and gradients in float8 with a
scale for each row."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenformer.ops.pattention_float8_copies_triton import _raise_to, _scale_of
from tokenformer.ops.pattention_float8_words_triton import rounded
from tokenformer.ops.pattention_triton import row_statistics
from tokenformer.ops.pattention_triton_math import (
    GELU,
    GELU_L2_NORM,
    L2_NORM_GELU,
    SOFTMAX,
    backward_terms,
    before_statistics,
    row_factor,
    score_gradient,
    weight_of,
)


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
    first, second = row_statistics(parts, KIND, ROWS, PIECES)
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
        result = rounded(found[i] * inverse, weights.dtype.element_ty)
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
    # scales of rows join what the rows are multiplied by anyway
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
        of_scores = factor * input_scale if KIND == L2_NORM_GELU else factor
        along = tl.zeros((ROWS, PIECE), tl.float32)
        kept = ()
        for i in tl.static_range(PIECES):
            column = i * PIECE + tl.arange(0, PIECE)[None, :]
            inside = there if EVEN else there & (column < n)
            score = tl.load(scores + source * n + column, mask=inside, other=missing).to(tl.float32)
            grad = tl.load(weight_grads + place * n + column, mask=inside, other=0.0).to(tl.float32)
            if KIND != L2_NORM_GELU:
                score = score * input_scale
            if KIND == GELU or KIND == SOFTMAX:  # noqa: SIM109  (Triton has no `in`)
                grad = grad * grad_scale
            _, y, grad, slope = backward_terms(score, grad, first, of_scores, KIND, TANH, EXACT)
            along += y * grad
            kept = kept + ((y, grad, slope),)  # noqa: RUF005
        total = tl.sum(along, axis=1, keep_dims=True)
        if KIND == L2_NORM_GELU or KIND == GELU_L2_NORM:  # noqa: SIM109
            total, factor = total * grad_scale, factor * grad_scale
        for i in tl.static_range(PIECES):
            y, grad, slope = kept[i]
            grad = score_gradient(y, grad, slope, total, first, second, factor, root, tau, KIND)
            largest = tl.maximum(largest, tl.abs(grad))
            found = found + (grad,)  # noqa: RUF005
    scale = _scale_of(tl.max(largest, axis=1, keep_dims=True))
    inverse = 1 / scale
    for p in tl.static_range(PROJECTIONS):
        for i in tl.static_range(PIECES):
            column = i * PIECE + tl.arange(0, PIECE)[None, :]
            inside = there if EVEN else there & (column < n)
            result = rounded(found[p * PIECES + i] * inverse, score_grads.dtype.element_ty)
            tl.store(score_grads + (row * PROJECTIONS + p) * n + column, result, mask=inside)
    tl.store(score_grad_scales + row, scale, mask=there)
    _raise_to(largest_scale, tl.max(tl.where(there, scale, 0.0)))
