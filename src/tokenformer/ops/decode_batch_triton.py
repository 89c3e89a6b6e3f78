"""Triton kernels for one token of each of a few sequences at a time.

Reading the weights is still most of the work, so a product reads each once, and multiplies it with the vectors of all
sequences by matrix instructions. Its programs have a tile of the matrix each: some rows, and a part of the columns
(a split), so that all multiprocessors have work. What the splits add up to is left to the kernel that makes the next
vectors, which adds in the order of the splits: results depend on no timing. That kernel has a program for each vector,
and makes it once for all programs of the next product.

A vector is stored as the sum of TERMS numbers of the type that is multiplied. With two in bfloat16, the second what the
first leaves, its error is 2^-17, and up to 8 sequences cost no more, since a tile has 16 columns at least; with one it
is 2^-9, as in a plain model in bfloat16.

Axis letters: k splits, b sequences, p projections, d hidden, h heads, e head size, s parts of attention.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenformer.ops.decode_triton import LAYER_NORM, SCORES, _prefetch, _wide
from tokenformer.ops.decode_vectors_triton import (
    _joined_attention,
    _layer_norm,
    _pattention_weights,
    term_of,
)
from tokenformer.ops.pattention_triton_math import GELU, GELU_L2_NORM, SOFTMAX, before_statistics


@triton.jit
def make_vectors(
    parts,
    stream,
    gain,
    shift,
    vectors,
    size,
    projections,
    layer_norm_eps,
    root,
    tau,
    norm_eps,
    INPUT: tl.constexpr,
    KIND: tl.constexpr,
    TANH: tl.constexpr,
    EXACT: tl.constexpr,
    AFFINE: tl.constexpr,
    SPLITS: tl.constexpr,
    TERMS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """The vectors of a product, ``vectors`` [b, TERMS, p, size], from ``parts`` [SPLITS, b, p, size] float32 of the
    product before, a program each.

    LAYER_NORM (p = 1): the parts are added to the residual stream ``stream`` [b, size] float32, whose norm the vector
    is. SCORES: they add up to Pattention's scores, whose weights the vector is.
    """
    if HOPPER:
        gdc_launch_dependents()
        gdc_wait()
    vector = tl.program_id(0)
    column = tl.arange(0, PIECE)[None, :]
    totals = ()
    for i in tl.static_range(PIECES):
        at = i * PIECE + column
        inside = at < size
        if INPUT == LAYER_NORM:
            total = tl.load(stream + vector * size + at, mask=inside, other=0.0)
        else:
            total = tl.zeros((1, PIECE), tl.float32)
        for split in tl.static_range(SPLITS):
            first = (split * tl.num_programs(0) + vector) * size
            total += tl.load(parts + first + at, mask=inside, other=0.0)
        if INPUT == LAYER_NORM and SPLITS > 0:
            tl.store(stream + vector * size + at, total, mask=inside)
        if INPUT == SCORES and (KIND == GELU or KIND == GELU_L2_NORM):  # noqa: SIM109
            total = before_statistics(total, GELU_L2_NORM, TANH, EXACT)
        if INPUT == SCORES and KIND == SOFTMAX:
            total = tl.where(inside, total, float("-inf"))
        totals = totals + (total,)  # noqa: RUF005
    if INPUT == LAYER_NORM:
        totals = _layer_norm(totals, size, layer_norm_eps, gain, shift, AFFINE, PIECE, PIECES)
    else:
        totals = _pattention_weights(totals, root, tau, norm_eps, KIND, TANH, EXACT, PIECES, HOPPER)
    b = vector // projections
    for i in tl.static_range(PIECES):
        at = i * PIECE + column
        for term in tl.static_range(TERMS):
            target = ((b * TERMS + term) * projections + vector % projections) * size
            number = term_of(totals[i], term, vectors.dtype.element_ty, TERMS)
            tl.store(vectors + target + at, number, mask=at < size)


@triton.jit
def join_attention(
    parts,
    statistics,
    vectors,
    size,
    head_size,
    SPLITS: tl.constexpr,
    TERMS: tl.constexpr,
    PIECE: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """``vectors`` [b, TERMS, size] from what :func:`attend` has left: ``parts`` [b, SPLITS, h, e] and their
    ``statistics``; a program for each PIECE of each."""
    if HOPPER:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0)
    column = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    whole = _joined_attention(parts, statistics, b, column, size, head_size, SPLITS)
    for term in tl.static_range(TERMS):
        number = term_of(whole, term, vectors.dtype.element_ty, TERMS)
        tl.store(vectors + (b * TERMS + term) * size + column, number, mask=column < size)


@triton.jit
def _matrix_tile(weight, first, row, rows, columns, PIECE: tl.constexpr):
    """[ROWS, PIECE] of ``weight``, which is at the first of these rows, from column ``first`` on."""
    column = first + tl.arange(0, PIECE)[None, :]
    own_row = tl.arange(0, row.shape[0])[:, None]
    inside = (row < rows) & (column < columns)
    return tl.load(weight + own_row * columns + column, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def _vector_tile(source, first, columns, stride, numbers, PIECE: tl.constexpr, WIDTH: tl.constexpr):
    """[PIECE, WIDTH] of the ``numbers`` vectors, ``stride`` apart, from column ``first`` on."""
    column = first + tl.arange(0, PIECE)[:, None]
    number = tl.arange(0, WIDTH)[None, :]
    inside = (number < numbers) & (column < columns)
    return tl.load(source + number * stride + column, mask=inside, other=0.0)


@triton.jit
def product(
    source,
    weight,
    weight_scale,
    bias,
    out,
    rows,
    columns,
    vector_stride,
    projection_stride,
    batch,
    alpha,
    coming,
    coming_bytes,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    HELD: tl.constexpr,
    STAGES: tl.constexpr,
    THREADS: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """``out[k, b, p, r] = alpha * scale[p, r] * sum over c of weight[p, r, c] * vector[b, p, c]``, c the columns of
    split k, PIECES times PIECE of them; ``bias[p, r]`` is added in the first split.

    ``weight`` [p, rows, columns]; ``source`` has the vectors, [b, TERMS, ...], ``vector_stride`` apart, those of
    projections ``projection_stride``. The first HELD pieces of the tile are loaded before the kernel before has ended,
    the others pass through shared memory after it.
    """
    if HOPPER:
        gdc_launch_dependents()
    blocks = tl.cdiv(rows, ROWS)
    projection = tl.program_id(0) // blocks
    first_row = (tl.program_id(0) % blocks) * ROWS
    split = tl.program_id(1)
    row = first_row + tl.arange(0, ROWS)[:, None]
    first = split * (PIECES * PIECE)
    weight += (projection * rows + first_row).to(tl.int64) * columns
    if HOPPER:  # before the loads: the tile goes to shared memory as soon as it is there
        _prefetch(coming, coming_bytes, THREADS)
    tiles = ()
    for i in tl.static_range(HELD):
        tiles = tiles + (_matrix_tile(weight, first + i * PIECE, row, rows, columns, PIECE),)  # noqa: RUF005
    at = projection * rows + row
    added = tl.zeros((ROWS, 1), tl.float32)
    if BIASED:
        added = tl.load(bias + at, mask=(row < rows) & (split == 0), other=0.0).to(tl.float32)
    scale = tl.full((ROWS, 1), 1.0, tl.float32)
    if SCALED:
        scale = tl.load(weight_scale + at, mask=row < rows, other=0.0)
    if HOPPER:
        gdc_wait()
    source += projection * projection_stride
    numbers = batch * TERMS
    vectors = ()
    for i in tl.static_range(HELD):  # all at once, so that they are waited for once
        vector = _vector_tile(source, first + i * PIECE, columns, vector_stride, numbers, PIECE, WIDTH)
        vectors = vectors + (vector,)  # noqa: RUF005
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in tl.static_range(HELD):
        tile = _narrow(tiles[i], vectors[i].dtype, HOPPER)
        sums = tl.dot(tile, vectors[i], sums, input_precision="ieee")
    if HELD < PIECES:
        for i in tl.range(HELD, PIECES, num_stages=STAGES):
            more = _matrix_tile(weight, first + i * PIECE, row, rows, columns, PIECE)
            vector = _vector_tile(source, first + i * PIECE, columns, vector_stride, numbers, PIECE, WIDTH)
            sums = tl.dot(_narrow(more, vector.dtype, HOPPER), vector, sums, input_precision="ieee")
    if TERMS > 1:
        sums = tl.sum(tl.reshape(sums, (ROWS, WIDTH // TERMS, TERMS)), axis=2)
    b = tl.arange(0, WIDTH // TERMS)[None, :]
    target = (split * batch + b) * (tl.num_programs(0) // blocks) + projection
    tl.store(out + target * rows + row, sums * (alpha * scale) + added, mask=(row < rows) & (b < batch))


@triton.jit
def _narrow(tile, dtype: tl.constexpr, QUICK: tl.constexpr):
    """In the type that is multiplied, in which whole numbers of 8 bits are exact."""
    if tile.dtype == tl.int8:
        return _wide(tile, QUICK).to(dtype)
    return tile.to(dtype)
