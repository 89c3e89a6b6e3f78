"""Triton kernels that take the likeliest token of each row, in two launches and without the host."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def largest_of_blocks(logits, best, index, finite, v, vocab_size, BLOCK: tl.constexpr):
    """Of each block of ``logits`` [b, v], in programs (blocks, b): the largest below ``vocab_size``, the first id that
    has it, and whether all those logits are finite; [b, blocks] each."""
    block, b = tl.program_id(0), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits + b.to(tl.int64) * v + token, mask=token < vocab_size, other=0.0).to(tl.float32)
    is_finite = tl.abs(logit) < float("inf")
    allowed = tl.where((token < vocab_size) & is_finite, logit, float("-inf"))
    largest = tl.max(allowed, axis=0)
    at = b * tl.num_programs(0) + block
    tl.store(best + at, largest)
    tl.store(index + at, tl.min(tl.where(allowed == largest, token, v), axis=0))
    tl.store(finite + at, tl.min(is_finite.to(tl.int32), axis=0))


@triton.jit
def largest_of_rows(
    best,
    index,
    finite,
    tokens,
    log,
    count,
    batch,
    blocks,
    vocab_size,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The ids into ``tokens`` [b] and row ``count`` of ``log`` [steps, b + 1], whose last column is whether all was
    finite; ``count`` [1] goes up by one."""
    step = tl.load(count)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCKS)[None, :]
    inside = (row < batch) & (column < blocks)
    at = row * blocks + column
    largest = tl.load(best + at, mask=inside, other=float("-inf"))
    ids = tl.load(index + at, mask=inside, other=vocab_size)
    top = tl.max(largest, axis=1, keep_dims=True)
    chosen = tl.min(tl.where(largest == top, ids, vocab_size), axis=1)
    chosen = tl.minimum(chosen, vocab_size - 1)
    sequence = tl.arange(0, ROWS)
    tl.store(tokens + sequence, chosen, mask=sequence < batch)
    tl.store(log + step * (batch + 1) + sequence, chosen, mask=sequence < batch)
    whole = tl.min(tl.min(tl.load(finite + at, mask=inside, other=1), axis=1), axis=0)
    tl.store(log + step * (batch + 1) + batch, whole)
    tl.debug_barrier()  # every thread has read the count
    tl.store(count, step + 1)
