"""Triton code that makes the vectors which a token's products take: a layer norm, Pattention's weights from its scores,
attention's parts put together."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenformer.ops.pattention_triton import row_statistics
from tokenformer.ops.pattention_triton_math import (
    GELU,
    L2_NORM_GELU,
    _sigmoid_argument,
    row_factor,
    weight_of,
)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _layer_norm(
    parts, columns, eps, gain, shift, AFFINE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr
):
    """Mean and variance from the sums of the first and second powers, which take one reduction together."""
    column = tl.arange(0, PIECE)[None, :]
    total, squares = parts[0], parts[0] * parts[0]
    for i in tl.static_range(1, PIECES):
        total += parts[i]
        squares += parts[i] * parts[i]
    total, squares = tl.reduce((total, squares), 1, _add_pairs, keep_dims=True)
    mean = total / columns
    variance = tl.maximum(squares / columns - mean * mean, 0.0)
    scale = tl.rsqrt(variance + eps)
    normed = ()
    for i in tl.static_range(PIECES):
        inside = i * PIECE + column < columns
        part = tl.where(inside, (parts[i] - mean) * scale, 0.0)
        if AFFINE:
            part = part * tl.load(gain + i * PIECE + column, mask=inside, other=0.0).to(tl.float32)
            part += tl.load(shift + i * PIECE + column, mask=inside, other=0.0).to(tl.float32)
        normed = normed + (part,)  # noqa: RUF005
    return normed


@triton.jit
def _quick_gelu(z, TANH: tl.constexpr):
    """GELU by one instruction for the hyperbolic tangent, whose error of 2^-11 is a fourth of a bfloat16 rounding."""
    y, _ = _sigmoid_argument(z, TANH)
    tanh = tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [y * 0.34657359027997264], dtype=tl.float32, is_pure=True, pack=1
    )
    return 0.5 * z + 0.5 * z * tanh


@triton.jit
def _pattention_weights(
    parts,
    root,
    tau,
    eps,
    KIND: tl.constexpr,
    TANH: tl.constexpr,
    EXACT: tl.constexpr,
    PIECES: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Weights from what the product before has stored: scores, or their GELU for the kinds that begin with it."""
    first, second = row_statistics(parts, KIND, 1, PIECES)
    factor = row_factor(first, second, root, tau, eps, KIND)
    weights = ()
    for i in tl.static_range(PIECES):
        part = parts[i]
        if KIND == L2_NORM_GELU and HOPPER and not EXACT:
            part = _quick_gelu(part * factor, TANH)
        elif KIND != GELU:
            part = weight_of(part, first, factor, KIND, TANH, EXACT)
        weights = weights + (part,)  # noqa: RUF005
    return weights


@triton.jit
def _joined_attention(source, statistics, b, column, columns, head_size, SPLITS: tl.constexpr):
    """What :func:`attend` has left of these features, over its splits."""
    inside = column < columns
    heads = columns // head_size
    head = column // head_size
    largest = tl.full(column.shape, float("-inf"), tl.float32)
    for s in tl.static_range(SPLITS):
        at = (b * SPLITS + s) * heads + head
        largest = tl.maximum(largest, tl.load(statistics + at, mask=inside, other=0.0))
    total = tl.zeros(column.shape, tl.float32)
    share = tl.zeros(column.shape, tl.float32)
    for s in tl.static_range(SPLITS):
        at = (b * SPLITS + s) * heads + head
        weight = tl.exp(tl.load(statistics + at, mask=inside, other=0.0) - largest)
        total += weight * tl.load(source + (b * SPLITS + s) * columns + column, mask=inside, other=0.0)
        share += weight
    return total / share


@triton.jit
def term_of(whole, term, dtype: tl.constexpr, TERMS: tl.constexpr):
    """Number ``term`` of the TERMS that add up to ``whole``, float32."""
    number = whole.to(dtype)
    if TERMS > 1:
        number = tl.where(term == 0, number, (whole - number.to(tl.float32)).to(dtype))
    return number
