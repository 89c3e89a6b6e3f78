"""What Pattention's Triton kernels do to one score: the weight, its gradient, and the guards of the row norm.

All of it in float32. ``KIND`` is the position in :data:`~tokenformer.ops.pattention.NORM_ACTIVATIONS`; ``TANH``
chooses the form of GELU; ``EXACT`` takes the error function itself, for float32, in place of a fit that bfloat16
cannot tell from it. A row has two figures, ``first`` and ``second``: the scale and the norm of the scaled row, or for
softmax the largest score and the sum of the exponentials below it.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from tokenformer.ops.pattention import NORM_ACTIVATIONS

GELU = tl.constexpr(0)  # positions in NORM_ACTIVATIONS
L2_NORM_GELU = tl.constexpr(1)
GELU_L2_NORM = tl.constexpr(2)
SOFTMAX = tl.constexpr(3)
LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
assert NORM_ACTIVATIONS == ("gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax")


@triton.jit
def _sigmoid_argument(z, TANH: tl.constexpr):
    """``y``, in units of ln 2, and ``dy/dz``, not in them, with ``gelu(z) = z sigmoid(y)``.

    The tanh form is such a function exactly. For the erf form the polynomial is the one with the smallest largest
    error of ``z sigmoid(y)``: 2.5e-5 (1.1e-4 in the derivative), a hundredth of a bfloat16 rounding at 1. The square is
    bounded where the sigmoid is 0 or 1 already, so that nothing overflows.
    """
    if TANH:
        t = tl.minimum(z * z, 900.0)
        factor = (2 * 0.7978845608028654 * LOG2_E) + (2 * 0.7978845608028654 * 0.044715 * LOG2_E) * t
        slope = (2 * 0.7978845608028654) + (6 * 0.7978845608028654 * 0.044715) * t
    else:
        t = tl.minimum(z * z, 36.0)
        factor = 1.59501317 * LOG2_E + t * (0.07401365 * LOG2_E - (0.00070341728 * LOG2_E) * t)
        slope = 1.59501317 + t * (3 * 0.07401365 - (5 * 0.00070341728) * t)
    return z * factor, slope


@triton.jit
def _power_of_two(x):
    """By one instruction, where the compiler's own form takes five for the sake of results below 1e-38."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _reciprocal(x):
    """Likewise, of numbers that are no smaller than 1."""
    if INTERPRETED:
        return 1 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _exponential(x, EXACT: tl.constexpr):
    return tl.exp(x) if EXACT else _power_of_two(x * LOG2_E)


@triton.jit
def _gelu(z, TANH: tl.constexpr, EXACT: tl.constexpr):
    if EXACT and not TANH:
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    y, _ = _sigmoid_argument(z, TANH)
    return z * _reciprocal(1 + _power_of_two(-y))


@triton.jit
def _gelu_and_slope(z, TANH: tl.constexpr, EXACT: tl.constexpr):
    """GELU and its derivative."""
    if EXACT and not TANH:
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        return z * cdf, cdf + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    y, slope = _sigmoid_argument(z, TANH)
    sigmoid = _reciprocal(1 + _power_of_two(-y))
    value = z * sigmoid
    return value, sigmoid + (value - value * sigmoid) * slope


@triton.jit
def scale_of(largest):
    """The factor that brings rows with this largest absolute value to about 1."""
    return tl.where(largest > 0, 1 / tl.maximum(largest, 1.2e-38), 1.0)


@triton.jit
def before_statistics(score, KIND: tl.constexpr, TANH: tl.constexpr, EXACT: tl.constexpr):
    """What the row statistics are of."""
    if KIND == GELU_L2_NORM:
        return _gelu(score, TANH, EXACT)
    return score


@triton.jit
def safe_squares(total):
    """Whether a sum of squares in float32 has lost nothing that matters."""
    return (total > 1e-30) & (total < 1e36)


@triton.jit
def norm_of(total):
    return tl.where(total > 0, tl.sqrt(total), float("inf"))


@triton.jit
def row_factor(first, second, root, tau, eps, KIND: tl.constexpr):
    """What a row is multiplied by: for softmax its exponentials, else its scores, or their GELU."""
    if KIND == SOFTMAX:
        return tau / second
    return tl.minimum(root / (second + eps * first) * first, 3e38)


@triton.jit
def weight_of(part, first, factor, KIND: tl.constexpr, TANH: tl.constexpr, EXACT: tl.constexpr):
    """Weights from :func:`before_statistics` and the statistics of the row."""
    if KIND == GELU:
        return _gelu(part, TANH, EXACT)
    if KIND == L2_NORM_GELU:
        return _gelu(part * factor, TANH, EXACT)
    if KIND == GELU_L2_NORM:
        return part * factor
    return _exponential(part - first, EXACT) * factor


@triton.jit
def backward_terms(score, grad, first, factor, KIND: tl.constexpr, TANH: tl.constexpr, EXACT: tl.constexpr):
    """The weight; y and g, whose product summed over the row is what :func:`score_gradient` needs; and the slope of the
    activation where it comes after the sum."""
    if KIND == L2_NORM_GELU:
        y = score * factor
        weight, slope = _gelu_and_slope(y, TANH, EXACT)
        return weight, y, grad * slope, slope
    if KIND == SOFTMAX:
        weight = _exponential(score - first, EXACT) * factor
        return weight, weight, grad, grad
    weight, slope = _gelu_and_slope(score, TANH, EXACT)
    if KIND == GELU_L2_NORM:
        weight = weight * factor
    return weight, weight, grad, slope


@triton.jit
def score_gradient(y, grad, slope, total, first, second, factor, root, tau, KIND: tl.constexpr):
    """Gradient of a score. Through y = c s / (r + eps), r = |s|: ds = c dy / (r + eps) - y (y . dy) / (c r)."""
    if KIND == GELU:
        return grad * slope
    if KIND == SOFTMAX:
        return (grad - total / tau) * y
    through_norm = grad * factor - (total / (root * second) * first) * y
    if KIND == GELU_L2_NORM:
        return through_norm * slope
    return through_norm
