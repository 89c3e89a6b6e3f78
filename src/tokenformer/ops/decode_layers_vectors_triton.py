"""Triton code that makes the vectors of the kernel of all layers: layer norms, Pattention's weights from its scores."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenformer.ops.decode_vectors_triton import _add_pairs, _quick_gelu
from tokenformer.ops.pattention_triton_math import (
    GELU,
    L2_NORM_GELU,
    SOFTMAX,
    norm_of,
    row_factor,
    safe_squares,
    scale_of,
    weight_of,
)


@triton.jit
def _normed(parts, d, eps, PIECES: tl.constexpr):
    """The layer norm of a row [1, d] in parts."""
    total, squares = parts[0], parts[0] * parts[0]
    for j in tl.static_range(1, PIECES):
        total += parts[j]
        squares += parts[j] * parts[j]
    total, squares = tl.reduce((total, squares), 1, _add_pairs, keep_dims=True)
    mean = total / d
    scale = tl.rsqrt(tl.maximum(squares / d - mean * mean, 0.0) + eps)
    normed = ()
    for j in tl.static_range(PIECES):
        normed = normed + ((parts[j] - mean) * scale,)  # noqa: RUF005
    return normed


@triton.jit
def _sum(numbers):
    return tl.sum(tl.sum(numbers, axis=1), axis=0)


@triton.jit
def _largest(numbers):
    return tl.max(tl.max(numbers, axis=1), axis=0)


@triton.jit
def _weights(
    parts, copies, tau, eps, KIND: tl.constexpr, TANH: tl.constexpr, EXACT: tl.constexpr, PIECES: tl.constexpr
):
    """Pattention's weights from what the phase before has stored, of which ``parts`` hold each number ``copies`` times;
    guarded as in the kernels of the training step."""
    first, second = 1.0, 1.0
    if KIND == SOFTMAX:
        largest = parts[0]
        for j in tl.static_range(1, PIECES):
            largest = tl.maximum(largest, parts[j])
        first = _largest(largest)
        total = tl.exp(parts[0] - first)
        for j in tl.static_range(1, PIECES):
            total += tl.exp(parts[j] - first)
        second = tl.maximum(_sum(total) / copies, 1.0)
    elif KIND != GELU:
        squares = parts[0] * parts[0]
        for j in tl.static_range(1, PIECES):
            squares += parts[j] * parts[j]
        total = _sum(squares) / copies
        if not safe_squares(total):
            largest = tl.abs(parts[0])
            for j in tl.static_range(1, PIECES):
                largest = tl.maximum(largest, tl.abs(parts[j]))
            first = scale_of(_largest(largest))
            squares = (parts[0] * first) * (parts[0] * first)
            for j in tl.static_range(1, PIECES):
                squares += (parts[j] * first) * (parts[j] * first)
            total = _sum(squares) / copies
        second = norm_of(total)
    factor = row_factor(first, second, tl.sqrt(tau), tau, eps, KIND)
    weights = ()
    for j in tl.static_range(PIECES):
        part = parts[j]
        if KIND == L2_NORM_GELU and not EXACT:
            part = _quick_gelu(part * (first * factor), TANH)
        elif KIND != GELU:
            part = weight_of(part, first, factor, KIND, TANH, EXACT)
        weights = weights + (part,)  # noqa: RUF005
    return weights


@triton.jit
def _spread(parts, ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """[1, PIECE] to [ROWS, PIECE], through one axis: so the threads share the work of making a vector."""
    wide = ()
    for j in tl.static_range(PIECES):
        row = tl.reshape(parts[j], (PIECE,))[None, :]
        wide = wide + (tl.broadcast_to(row, (ROWS, PIECE)),)  # noqa: RUF005
    return wide
