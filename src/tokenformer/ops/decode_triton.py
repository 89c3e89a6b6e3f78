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

from tokenformer.ops.decode_vectors_triton import _joined_attention, _layer_norm, _pattention_weights
from tokenformer.ops.pattention_triton_math import GELU_L2_NORM, SOFTMAX, before_statistics

LAYER_NORM = tl.constexpr(0)
SCORES = tl.constexpr(1)
ATTENTION = tl.constexpr(2)


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
def embed(tokens, table, out, hidden, BLOCK: tl.constexpr, HOPPER: tl.constexpr):
    """Rows ``tokens`` [b] of ``table`` [v, d] as float32 [b, d].

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
