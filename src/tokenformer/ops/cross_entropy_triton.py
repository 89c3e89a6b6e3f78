"""Triton kernel of the cross-entropy over rows of logits: the loss, and its gradient in place of the logits.

A target that is no class makes the loss NaN: the kernel cannot raise.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cross_entropy_rows(
    logits,
    targets,
    losses,
    v,
    scale,
    ignored,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One row of [rows, v]: cross-entropy of ``scale * logits`` in nats, 0 where the target is ``ignored``."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * v
    target = tl.load(targets + row)
    kept = target != ignored
    largest = float("-inf")
    total = 0.0
    for first in range(0, BLOCKS * BLOCK, BLOCK):
        column = first + tl.arange(0, BLOCK)
        score = tl.load(start + column, mask=column < v, other=float("-inf")).to(tl.float32) * scale
        larger = tl.maximum(largest, tl.max(score, axis=0))
        reference = tl.where(larger > float("-inf"), larger, 0.0)
        total = total * tl.exp(largest - reference) + tl.sum(tl.exp(score - reference), axis=0)
        largest = larger
    chosen = (
        tl.load(start + target, mask=(target >= 0) & (target < v), other=float("nan")).to(tl.float32) * scale
    )
    normaliser = largest + tl.log(total)
    tl.store(losses + row, tl.where(kept, normaliser - chosen, 0.0))
    if WITH_GRADIENT:
        factor = tl.where(kept, scale, 0.0)
        for first in range(0, BLOCKS * BLOCK, BLOCK):
            column = first + tl.arange(0, BLOCK)
            score = tl.load(start + column, mask=column < v, other=0.0).to(tl.float32) * scale
            probability = tl.exp(score - normaliser)
            gradient = (probability - tl.where(column == target, 1.0, 0.0)) * factor
            tl.store(start + column, gradient.to(logits.dtype.element_ty), mask=column < v)
