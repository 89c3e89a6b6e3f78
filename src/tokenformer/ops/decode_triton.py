"""Triton kernels for one token at a time, where reading the weights is all the work.

Every product is a matrix times a vector (or a few): a program holds some rows of the matrix in registers, makes the
vector it is to be multiplied with (a layer norm, Pattention's weights from its scores, attention's parts put together)
and writes, or adds to the residual stream, a few numbers. So a Pattention is two launches and a layer seven. A
program asks for its matrix before it waits for the kernel before (programmatic dependent launch), whose end and the
launch are then hidden. Vectors between kernels are float32.

Axis letters: b sequences, d hidden, h heads, e head size, n parameter tokens, T capacity of the cache, s splits of it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenformer.ops.pattention_triton import _row_norm, _row_softmax
from tokenformer.ops.pattention_triton_math import (
    GELU,
    GELU_L2_NORM,
    L2_NORM_GELU,
    SOFTMAX,
    _sigmoid_argument,
    before_statistics,
    row_factor,
    weight_of,
)

LAYER_NORM = tl.constexpr(0)
SCORES = tl.constexpr(1)
ATTENTION = tl.constexpr(2)


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
    first = tl.full((1, 1), 1.0, tl.float32)
    second = first
    if KIND == SOFTMAX:
        first, second = _row_softmax(parts, PIECES)
    elif KIND != GELU:
        first, second = _row_norm(parts, PIECES)
    factor = row_factor(first, second, root, tau, eps, KIND)
    weights = ()
    for i in tl.static_range(PIECES):
        part = parts[i]
        if KIND == L2_NORM_GELU and HOPPER and not EXACT:
            part = _quick_gelu(part * (first * factor), TANH)
        elif KIND != GELU:
            part = weight_of(part, first, factor, KIND, TANH, EXACT)
        weights = weights + (part,)  # noqa: RUF005
    return weights


@triton.jit
def _prefetch(start, size, THREADS: tl.constexpr):
    """Ask for ``size`` bytes from ``start`` on to come into the L2 cache, each program and thread for a part."""
    program = tl.program_id(0) + tl.num_programs(0) * (
        tl.program_id(1) + tl.num_programs(1) * tl.program_id(2)
    )
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    each = tl.cdiv(size, programs * THREADS * 16) * 16
    first = (program * THREADS + tl.arange(0, THREADS)) * each
    length = tl.maximum(tl.minimum(each, size - first), 0)
    tl.inline_asm_elementwise(
        """{ .reg .pred wanted;
        setp.gt.s32 wanted, $2, 0;
        @wanted cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0; }""",
        "=r,l,r",
        [start.to(tl.int64) + first, length],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


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
def _wide(tile, QUICK: tl.constexpr):
    """In float32. Four whole numbers q of 8 bits at a time are put, as 128 + q, behind the leading bits of 2^23, which
    is then taken off with the 128: the converter is several times slower."""
    if QUICK and tile.dtype == tl.int8:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 shifted;
            xor.b32 shifted, $4, 0x80808080;
            prmt.b32 $0, shifted, 0x4B000000, 0x7650;
            prmt.b32 $1, shifted, 0x4B000000, 0x7651;
            prmt.b32 $2, shifted, 0x4B000000, 0x7652;
            prmt.b32 $3, shifted, 0x4B000000, 0x7653;
            sub.f32 $0, $0, 0f4B000080;
            sub.f32 $1, $1, 0f4B000080;
            sub.f32 $2, $2, 0f4B000080;
            sub.f32 $3, $3, 0f4B000080; }""",
            "=f,=f,=f,=f,r",
            [tile],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    return tile.to(tl.float32)


@triton.jit
def gemv(
    source,
    statistics,
    weight,
    weight_scale,
    bias,
    gain,
    shift,
    out,
    rows,
    columns,
    source_stride,
    head_size,
    layer_norm_eps,
    root,
    tau,
    norm_eps,
    alpha,
    coming,
    coming_bytes,
    INPUT: tl.constexpr,
    KIND: tl.constexpr,
    TANH: tl.constexpr,
    EXACT: tl.constexpr,
    AFFINE: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    THREADS: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """``out[b, p, r] (+)= alpha * scale[p, r] * sum over c of weight[p, r, c] * vector[b, p, c] + bias[p, r]``.

    ``weight`` [p, rows, columns]; ``vector`` is what INPUT makes of ``source`` [b, p, columns] (LAYER_NORM and
    ATTENTION: [b, columns], the same for all p). ACTIVATE applies what Pattention's kind does to a score by itself.
    ``coming_bytes`` from ``coming`` on are asked for on behalf of later kernels.
    """
    if HOPPER:
        gdc_launch_dependents()
    blocks = tl.cdiv(rows, ROWS)
    projection = tl.program_id(0) // blocks
    first_row = (tl.program_id(0) % blocks) * ROWS
    own_row = tl.arange(0, ROWS)[:, None]
    row = first_row + own_row
    column = tl.arange(0, PIECE)[None, :]
    at = projection * rows + row
    weight += (projection * rows + first_row).to(tl.int64) * columns
    tiles = ()
    for i in tl.static_range(PIECES):
        inside = (row < rows) & (i * PIECE + column < columns)
        place = weight + own_row * columns + i * PIECE + column
        tiles = tiles + (tl.load(place, mask=inside, other=0, eviction_policy="evict_first"),)  # noqa: RUF005
    added = tl.zeros((ROWS, 1), tl.float32)
    if BIASED:
        added = tl.load(bias + at, mask=row < rows, other=0.0).to(tl.float32)
    scale = tl.full((ROWS, 1), 1.0, tl.float32)
    if SCALED:
        scale = tl.load(weight_scale + at, mask=row < rows, other=0.0)
    if HOPPER:
        _prefetch(coming, coming_bytes, THREADS)
        gdc_wait()
    missing: tl.constexpr = float("-inf") if INPUT == SCORES and KIND == SOFTMAX else 0.0
    for b in range(BATCH):
        target = out + b * (tl.num_programs(0) // blocks) * rows + at
        before = tl.zeros((ROWS, 1), tl.float32)
        if RESIDUAL:
            before = tl.load(target, mask=row < rows, other=0.0)
        parts = ()
        for i in tl.static_range(PIECES):
            if INPUT == ATTENTION:
                part = _joined_attention(
                    source, statistics, b, i * PIECE + column, columns, head_size, SPLITS
                )
            else:
                offsets = b * source_stride + i * PIECE + column
                if INPUT == SCORES:
                    offsets += projection * columns
                part = tl.load(source + offsets, mask=i * PIECE + column < columns, other=missing)
            parts = parts + (part,)  # noqa: RUF005
        if INPUT == LAYER_NORM:
            parts = _layer_norm(parts, columns, layer_norm_eps, gain, shift, AFFINE, PIECE, PIECES)
        if INPUT == SCORES:
            parts = _pattention_weights(parts, root, tau, norm_eps, KIND, TANH, EXACT, PIECES, HOPPER)
        products = tl.zeros((ROWS, PIECE), tl.float32)
        for i in tl.static_range(PIECES):
            # through one axis, so that the vector takes on the layout of the matrix and not the other way round
            vector = tl.reshape(parts[i], (PIECE,))[None, :]
            products += _wide(tiles[i], HOPPER) * vector
        total = tl.sum(products, axis=1, keep_dims=True) * (alpha * scale) + added
        if ACTIVATE:
            total = before_statistics(total, GELU_L2_NORM, TANH, EXACT)
        tl.store(target, total + before, mask=row < rows)


@triton.jit
def _turned(source, feature, inside, cos, sin, ROTARY: tl.constexpr):
    """Features of one head, the first ROTARY of them turned: half-split as in :mod:`tokenformer.ops.rotary`."""
    plain = tl.load(source + feature, mask=inside, other=0.0)
    if ROTARY == 0:
        return plain
    HALF: tl.constexpr = ROTARY // 2
    partner = tl.where(feature < HALF, feature + HALF, feature - HALF)
    other = tl.load(source + partner, mask=inside & (feature < ROTARY), other=0.0)
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
def _attend_part(
    vectors,
    hidden,
    key_cache,
    value_cache,
    keys,
    values,
    cos,
    sin,
    length,
    block,
    split,
    splits,
    head_size,
    scale,
    out,
    statistic,
    ROTARY: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head's attention over every ``splits``-th block of its cache from ``block`` on, whose first ``keys`` and
    ``values`` are here already; ``vectors`` are its query, key and value, ``hidden`` apart."""
    feature = tl.arange(0, FEATURES)
    inside = feature < head_size
    query = _turned(vectors, feature, inside, cos, sin, ROTARY) * scale
    largest = float("-inf")
    share = 0.0
    total = tl.zeros((FEATURES,), tl.float32)
    if split == 0:
        key = _turned(vectors + hidden, feature, inside, cos, sin, ROTARY)
        value = tl.load(vectors + 2 * hidden + feature, mask=inside, other=0.0)
        here = length * head_size + feature
        tl.store(key_cache + here, key.to(key_cache.dtype.element_ty), mask=inside)
        tl.store(value_cache + here, value.to(value_cache.dtype.element_ty), mask=inside)
        largest = tl.sum(query * key, axis=0)
        share = 1.0
        total = value
    there = block + tl.arange(0, BLOCK) < length
    largest, share, total = _with_block(keys, values, query, there, largest, share, total)
    block += splits * BLOCK
    while block < length:  # Triton's interpreter takes no tensors for the bounds of a range
        keys = _cached(key_cache, block, length, head_size, FEATURES, BLOCK)
        values = _cached(value_cache, block, length, head_size, FEATURES, BLOCK)
        there = block + tl.arange(0, BLOCK) < length
        largest, share, total = _with_block(keys, values, query, there, largest, share, total)
        block += splits * BLOCK
    tl.store(out + feature, total / tl.maximum(share, 1e-30), mask=inside)
    tl.store(statistic, largest + tl.log(tl.maximum(share, 1e-30)))  # -inf without a token


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
    ROTARY: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Attention of one token over the cache [b, h, T, e] and itself, a part of the cache in each program (h, s, b).

    ``qkv`` [b, 3, h, e] float32, before rotary; the first split also writes this token's key and value into the cache.
    ``lengths`` [1], the tokens in the cache; ``starts`` [b], the first of them that is no padding; ``positions`` [b],
    of this token. Written: ``out`` [b, s, h, e], the attention over each part; ``statistics`` [b, s, h]: the logarithm
    of the sum of its exponentials. ``coming`` as in :func:`gemv`.

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
    _attend_part(
        qkv + b * 3 * hidden + head * head_size,
        hidden,
        key_cache + cache,
        value_cache + cache,
        keys,
        values,
        cos,
        sin,
        length,
        block,
        split,
        splits,
        head_size,
        scale,
        out + part * head_size,
        statistics + part,
        ROTARY,
        FEATURES,
        BLOCK,
    )


@triton.jit
def embed(tokens, table, out, zeroed, hidden, BLOCK: tl.constexpr, ZERO: tl.constexpr, HOPPER: tl.constexpr):
    """Rows ``tokens`` [b] of ``table`` [v, d] as float32 [b, d]; ZERO: ``zeroed`` [2] becomes zero.

    The first kernel of a token: those after it may rely on all that came before being done.
    """
    if HOPPER:
        gdc_wait()
        gdc_launch_dependents()
    b = tl.program_id(0)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + b)
    row = tl.load(table + token * hidden + feature, mask=feature < hidden, other=0.0)
    tl.store(out + b * hidden + feature, row.to(tl.float32), mask=feature < hidden)
    if ZERO:
        tl.store(zeroed + tl.arange(0, 2), tl.zeros((2,), tl.int32))
