"""Triton kernel of one token's attention over the cache, in parts.

Axis letters: b sequences, h heads, e head size, T capacity of the cache, s splits of it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenformer.ops.decode_triton import _prefetch
from tokenformer.ops.decode_vectors_triton import term_of


@triton.jit
def _summed(source, stride, feature, inside, PARTS: tl.constexpr):
    """The sum of PARTS vectors, ``stride`` apart, in their order."""
    total = tl.load(source + feature, mask=inside, other=0.0)
    for i in tl.static_range(1, PARTS):
        total += tl.load(source + i * stride + feature, mask=inside, other=0.0)
    return total


@triton.jit
def _turned(source, stride, feature, inside, cos, sin, PARTS: tl.constexpr, ROTARY: tl.constexpr):
    """Features of one head, the first ROTARY of them turned: half-split as in :mod:`tokenformer.ops.rotary`."""
    plain = _summed(source, stride, feature, inside, PARTS)
    if ROTARY == 0:
        return plain
    HALF: tl.constexpr = ROTARY // 2
    partner = tl.where(feature < HALF, feature + HALF, feature - HALF)
    other = _summed(source, stride, partner, inside & (feature < ROTARY), PARTS)
    return plain * cos + tl.where(feature < HALF, -other, other) * sin


@triton.jit
def _with_block(keys, values, query, there, largest, share, total):
    """Largest score, sum of the exponentials below it and weighted sum of values, with one more block of tokens."""
    scores = tl.sum(keys.to(tl.float32) * query[None, :], axis=1)
    scores = tl.where(there, scores, float("-inf"))
    above = tl.maximum(largest, tl.max(scores, axis=0))
    base = tl.where(above > float("-inf"), above, 0.0)
    shrink = tl.exp(largest - base)
    exponentials = tl.exp(scores - base)
    total = total * shrink + tl.sum(values.to(tl.float32) * exponentials[:, None], axis=0)
    return above, share * shrink + tl.sum(exponentials, axis=0), total


@triton.jit
def _cached(cache, block, length, head_size, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """Keys or values [BLOCK, FEATURES] of the tokens from ``block`` on in the cache [T, e] of a head, past the
    first-level cache; zero from ``length`` on."""
    feature = tl.arange(0, FEATURES)[None, :]
    token = block + tl.arange(0, BLOCK)[:, None]
    there = (token < length) & (feature < head_size)
    return tl.load(cache + token * head_size + feature, mask=there, other=0.0, cache_modifier=".cg")


@triton.jit
def attend(
    qkv,
    key_cache,
    value_cache,
    cosine,
    sine,
    lengths,
    starts,
    positions,
    out,
    statistics,
    capacity,
    head_size,
    scale,
    coming,
    coming_bytes,
    PARTS: tl.constexpr,
    TERMS: tl.constexpr,
    ROTARY: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Attention of one token over the cache [b, h, T, e] and itself, a part of the cache in each program (h, s, b).

    ``qkv`` [PARTS, b, 3, h, e] float32, parts of a sum, before rotary; the first split also writes this token's key and
    value into the cache. ``lengths`` [1], the tokens in the cache; ``starts`` [b], the first that is no padding;
    ``positions`` [b], of this token. Written: ``out`` [b, s, h, e], the attention over each part; ``statistics``
    [b, s, h]: the logarithm of the sum of its exponentials. With TERMS > 0, for one part, ``out`` is
    [b, TERMS, h, e], the terms of the attention, and there are no statistics. ``coming`` as in :func:`gemv`.

    What the kernels right before do not write is loaded before they have ended, past the first-level cache.
    """
    if HOPPER:
        gdc_launch_dependents()
    head, heads = tl.program_id(0), tl.num_programs(0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    b = tl.program_id(2)
    feature = tl.arange(0, FEATURES)
    length = tl.load(lengths, cache_modifier=".cg")
    block = tl.load(starts + b, cache_modifier=".cg") + split * BLOCK
    position = tl.load(positions + b, cache_modifier=".cg")
    cache = (b * heads + head).to(tl.int64) * capacity * head_size
    keys = _cached(key_cache + cache, block, length, head_size, FEATURES, BLOCK)
    values = _cached(value_cache + cache, block, length, head_size, FEATURES, BLOCK)
    cos = tl.load(cosine + position * ROTARY + feature, mask=feature < ROTARY, other=1.0)
    sin = tl.load(sine + position * ROTARY + feature, mask=feature < ROTARY, other=0.0)
    if HOPPER:
        _prefetch(coming, coming_bytes, THREADS)
        gdc_wait()
    hidden = heads * head_size
    part = (b * splits + split) * heads + head
    vectors = qkv + b * 3 * hidden + head * head_size  # query, key and value, ``hidden`` apart
    stride = tl.num_programs(2) * 3 * hidden
    inside = feature < head_size
    query = _turned(vectors, stride, feature, inside, cos, sin, PARTS, ROTARY) * scale
    largest = float("-inf")
    share = 0.0
    total = tl.zeros((FEATURES,), tl.float32)
    if split == 0:
        key = _turned(vectors + hidden, stride, feature, inside, cos, sin, PARTS, ROTARY)
        value = _summed(vectors + 2 * hidden, stride, feature, inside, PARTS)
        here = cache + length * head_size + feature
        tl.store(key_cache + here, key.to(key_cache.dtype.element_ty), mask=inside)
        tl.store(value_cache + here, value.to(value_cache.dtype.element_ty), mask=inside)
        largest = tl.sum(query * key, axis=0)
        share = 1.0
        total = value
    there = block + tl.arange(0, BLOCK) < length
    largest, share, total = _with_block(keys, values, query, there, largest, share, total)
    block += splits * BLOCK
    while block < length:  # Triton's interpreter takes no tensors for the bounds of a range
        keys = _cached(key_cache + cache, block, length, head_size, FEATURES, BLOCK)
        values = _cached(value_cache + cache, block, length, head_size, FEATURES, BLOCK)
        there = block + tl.arange(0, BLOCK) < length
        largest, share, total = _with_block(keys, values, query, there, largest, share, total)
        block += splits * BLOCK
    total = total / tl.maximum(share, 1e-30)
    if TERMS == 0:
        tl.store(out + part * head_size + feature, total, mask=inside)
        tl.store(statistics + part, largest + tl.log(tl.maximum(share, 1e-30)))  # -inf without a token
    for term in tl.static_range(TERMS):
        at = ((b * TERMS + term) * heads + head) * head_size
        tl.store(out + at + feature, term_of(total, term, out.dtype.element_ty, TERMS), mask=inside)
