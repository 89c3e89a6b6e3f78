"""Triton kernels of AdamW (arXiv 1711.05101) over many tensors in one launch, found through a table of addresses.

The table has a row of ``WIDTH`` int64 for each tensor: the addresses of parameter, gradient, both moments and step
(all float32), its number of elements, and its first chunk. A chunk is what one program updates.
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDTH = tl.constexpr(8)
PARAMETER, GRADIENT, EXP_AVG, EXP_AVG_SQ, STEP, SIZE, FIRST = (tl.constexpr(column) for column in range(7))


@triton.jit(do_not_specialize=["tensors"])
def advance_steps(
    table, factors, found_inf, tensors, lr, log_beta1, log_beta2, FOUND_INF: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds 1 to the steps of ``tensors`` tensors, in programs (blocks of them), unless ``found_inf`` [] is 1.

    Into ``factors`` [tensors, 2]: ``lr / (1 - beta1^step)`` and ``1 / sqrt(1 - beta2^step)``, with the new step. In
    float64, as little is left of 1 - beta2; programs of :func:`update_chunks` share them.
    """
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < tensors
    place = tl.load(table + tensor * WIDTH + STEP, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(place, mask=inside, other=0.0) + 1
    wide = step.to(tl.float64)
    correction1 = 1 - tl.exp(wide * log_beta1)
    correction2 = 1 - tl.exp(wide * log_beta2)
    tl.store(factors + tensor * 2, (lr / correction1).to(tl.float32), mask=inside)
    tl.store(factors + tensor * 2 + 1, (1 / tl.sqrt(correction2)).to(tl.float32), mask=inside)
    tl.store(place, step, mask=tensor < _unless_found(tensors, found_inf, FOUND_INF))


@triton.jit
def update_chunks(
    table,
    tensor_of_chunk,
    factors,
    grad_scale,
    found_inf,
    decay,
    weight1,
    weight2,
    eps,
    GRAD_SCALE: tl.constexpr,
    FOUND_INF: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Parameters and moments after one step, in place, in programs (chunks); nothing is written if ``found_inf`` is 1.

    Args:
        table: [tensors, WIDTH] int64.
        tensor_of_chunk: [chunks] int32.
        factors: [tensors, 2], of :func:`advance_steps`.
        grad_scale: [], gradients are divided by it.
        found_inf: [].
        decay: weight decay times learning rate.
        weight1: 1 - beta1.
        weight2: 1 - beta2.
        eps: added to the root of the second moment.
        GRAD_SCALE: whether there is ``grad_scale``.
        FOUND_INF: whether there is ``found_inf``.
        ALIGNED: all addresses are multiples of 16 bytes, all sizes of 4: accesses are 16 bytes wide.
        CHUNK: elements, a multiple of ``BLOCK``.
        BLOCK: elements at a time.
    """
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_of_chunk + chunk)
    row = table + tensor * WIDTH
    start = (chunk - tl.load(row + FIRST)) * CHUNK
    parameters = _part(row, PARAMETER, start, ALIGNED)
    gradients = _part(row, GRADIENT, start, ALIGNED)
    exp_avgs = _part(row, EXP_AVG, start, ALIGNED)
    exp_avg_sqs = _part(row, EXP_AVG_SQ, start, ALIGNED)
    left = tl.minimum(tl.load(row + SIZE) - start, CHUNK).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 4)
    written = _unless_found(left, found_inf, FOUND_INF)  # what is read need not wait for it
    step_size = tl.load(factors + tensor * 2)
    unbias = tl.load(factors + tensor * 2 + 1)
    unscale = 1.0
    if GRAD_SCALE:
        unscale = 1 / tl.load(grad_scale)
    for first in range(0, CHUNK, BLOCK):
        element = first + tl.arange(0, BLOCK)
        inside = element < left
        # nothing is read twice in a step, except parameters, which the next forward takes
        gradient = tl.load(gradients + element, mask=inside, other=0.0, eviction_policy="evict_first")
        exp_avg = tl.load(exp_avgs + element, mask=inside, other=0.0, eviction_policy="evict_first")
        exp_avg_sq = tl.load(exp_avg_sqs + element, mask=inside, other=0.0, eviction_policy="evict_first")
        parameter = tl.load(parameters + element, mask=inside, other=0.0)
        gradient *= unscale
        exp_avg += weight1 * (gradient - exp_avg)
        exp_avg_sq += weight2 * (gradient * gradient - exp_avg_sq)
        update = step_size * exp_avg / (tl.sqrt(exp_avg_sq) * unbias + eps)
        parameter -= decay * parameter + update
        inside = element < written
        tl.store(exp_avgs + element, exp_avg, mask=inside, eviction_policy="evict_first")
        tl.store(exp_avg_sqs + element, exp_avg_sq, mask=inside, eviction_policy="evict_first")
        tl.store(parameters + element, parameter, mask=inside)


@triton.jit
def _part(row, column, start, ALIGNED: tl.constexpr):
    """Where a program's elements begin."""
    place = tl.load(row + column).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        place = tl.multiple_of(place, 16)
    return place + start


@triton.jit
def _unless_found(count, found_inf, FOUND_INF: tl.constexpr):
    """``count``, or 0 where ``found_inf`` is 1."""
    if FOUND_INF:
        count = tl.where(tl.load(found_inf) == 1, 0, count)
    return count
