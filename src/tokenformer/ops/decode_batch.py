"""Products of one token of each of a few sequences on a GPU: which kernel, and how it is laid out.

Two kernels take turns: :func:`make_vectors` adds up what the splits of a product left and makes the next vectors of it
(after attention :func:`join_attention` does), :func:`multiply_batch` multiplies. Axis letters: k splits, b sequences, p
projections, d hidden, h heads, e head size, s parts of attention, n parameter tokens.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tokenformer.ops.decode import (
    PLAIN,
    REGISTERS_FOR_THREE,
    Attended,
    Launch,
    Matrix,
    Normed,
    Weighed,
    launch_options,
)
from tokenformer.ops.decode_batch_triton import join_attention as _join_attention
from tokenformer.ops.decode_batch_triton import make_vectors as _make_vectors
from tokenformer.ops.decode_batch_triton import product as _product
from tokenformer.ops.decode_triton import LAYER_NORM, SCORES
from tokenformer.ops.pattention import NORM_ACTIVATIONS, WeightKind

_SHARED_BYTES_OF_A_PROGRAM = 1024  # besides those it asks for
_MOST_HELD = 3  # pieces
_MOST_REGISTERS = 255  # of a thread
_LARGEST_VECTOR_PIECE = 1024
_GELU = WeightKind("gelu", 1.0)
_JOINED_PIECE = 512
_JOINING_WARPS = 4
_MAKING_WARPS = 8


class BatchTile(NamedTuple):
    """How a product is laid out.

    Attributes:
        rows: of a program, 16 or more.
        piece: columns that are multiplied at once.
        pieces: of a program; the splits are as many as these take to cover all columns.
        held: pieces that are in registers before the vectors are there; the others go through shared memory.
        warps: of a program.
        stages: of the way through shared memory.
    """

    rows: int
    piece: int
    pieces: int
    held: int
    warps: int = 4
    stages: int = 4

    def splits(self, columns: int) -> int:
        """How many programs share a row."""
        return -(-columns // (self.piece * self.pieces))


class Gpu(NamedTuple):
    """What tiles are chosen for: multiprocessors, and the bytes of shared memory that one has."""

    multiprocessors: int
    shared_bytes: int

    def places(self, rows: int, width: int, columns: int) -> int:
        """Programs on a multiprocessor that hold so many columns of rows and vectors, of 16 bits, in its shared memory,
        which matrix instructions read."""
        return self.shared_bytes // (2 * (rows + width) * columns + _SHARED_BYTES_OF_A_PROGRAM)


HOPPER = Gpu(132, 228 * 1024)


@cache
def gpu_of(device: torch.device) -> Gpu:
    """Those of a CUDA device; of a Hopper GPU for other devices."""
    if device.type != "cuda":
        return HOPPER
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    most = driver.active.utils.get_device_properties(index)["max_shared_mem"]  # that one program may have
    count = torch.cuda.get_device_properties(index).multi_processor_count
    return Gpu(count, most + _SHARED_BYTES_OF_A_PROGRAM)


def choose_batch_tile(
    rows: int, columns: int, most_splits: int = 16, *, vectors: int, gpu: Gpu = HOPPER
) -> BatchTile:
    """For a matrix [rows, columns] and so many vectors (sequences times terms).

    Each program reads vectors besides its part of the matrix, and its sums are added up by the kernel after: the fewer
    programs the less of both. But programs on two thirds of the multiprocessors are needed to read at full speed, and
    those that have no place at once, for want of shared memory, read nothing before the kernel before has ended.

    - 128 rows of three pieces, if these programs have a place at once, and all multiprocessors one.
    - Else 64 rows, and the most pieces with which two thirds of the multiprocessors have a program, up to three; fewer
      rows of a small matrix, which would not keep a third of them at work.

    From 17 vectors on these are a third of what programs of 64 rows read. Larger ones are better then: of 128 rows if a
    third of the multiprocessors have one, or of more than three pieces if no multiprocessor has two.
    """
    piece = min(1 << max(4, (columns - 1).bit_length()), 128)
    count = -(-columns // piece)
    held = min(_MOST_HELD, count)
    width = width_of(vectors)
    tall = BatchTile(128, piece, held, held, warps=8)
    programs = -(-rows // tall.rows) * tall.splits(columns)
    fewest = gpu.multiprocessors // (3 if width > 16 else 1)
    places = gpu.multiprocessors * gpu.places(tall.rows, width, piece * held)
    if tall.splits(columns) <= most_splits and fewest <= programs <= places:
        return tall
    return _low_tile(rows, piece, count, min(count, most_splits), width, gpu)


def _low_tile(rows: int, piece: int, count: int, most_splits: int, width: int, gpu: Gpu) -> BatchTile:
    """Of 64 rows or fewer, and ``count`` pieces in all."""
    third = gpu.multiprocessors // 3
    height = next((height for height in (64, 32) if -(-rows // height) * most_splits >= third), 16)
    blocks = -(-rows // height)
    fewest = -(-count // most_splits)
    pieces = max(fewest, count // -(-2 * third // blocks))
    if pieces > _MOST_HELD and (width == 16 or blocks * -(-count // pieces) > gpu.multiprocessors):
        pieces = max(fewest, _MOST_HELD)
    if pieces <= _MOST_HELD:
        return BatchTile(height, piece, pieces, pieces)
    # one program on each, or better two, and then more stages; there is a piece besides these
    is_one = blocks * -(-count // pieces) <= gpu.multiprocessors
    wanted = 1 if is_one else 2
    stages = next((n for n in (4, 3) if gpu.places(height, width, piece * (n + 1)) >= wanted), 2)
    return BatchTile(height, piece, pieces, held=2 if is_one else 1, stages=stages)


def width_of(vectors: int) -> int:
    """Columns of the tile of so many vectors."""
    return max(16, 1 << (vectors - 1).bit_length())


def terms_of(dtype: torch.dtype) -> int:
    """Numbers of this type that a vector is stored in."""
    return 1 if dtype == torch.float32 else 2


def make_vectors(
    parts: Tensor | None,
    how: Normed | Weighed,
    vectors: Tensor,
    *,
    stream: Tensor | None = None,
    launch: Launch = PLAIN,
) -> None:
    """The vectors of a product.

    Args:
        parts: [k, b, p, n] float32, which add up to the scores, or to what comes to the residual stream; None for
            nothing.
        how: the vectors.
        vectors: [b, terms, p, n] of the type that is multiplied, ``terms_of`` it; written.
        stream: [b, 1, n] float32, the residual stream, where the vectors are its norm; the parts are added to it.
        launch: how it is started.
    """
    b, terms, projections, size = vectors.shape
    norm = how if isinstance(how, Normed) else Normed(0.0)
    kind = how.kind if isinstance(how, Weighed) else _GELU
    piece = min(1 << max(4, (size - 1).bit_length()), _LARGEST_VECTOR_PIECE)
    while piece > 256 and size % piece and size % (piece // 2) == 0:
        piece //= 2
    _make_vectors[(b * projections,)](
        stream if parts is None else parts,
        parts if stream is None else stream,
        norm.gain,
        norm.shift,
        vectors,
        size,
        projections,
        norm.eps,
        kind.tau**0.5,
        kind.tau,
        kind.norm_eps,
        INPUT=(LAYER_NORM if isinstance(how, Normed) else SCORES).value,
        KIND=NORM_ACTIVATIONS.index(kind.norm_activation),
        TANH=kind.gelu_approximate == "tanh",
        EXACT=vectors.dtype == torch.float32,
        AFFINE=norm.gain is not None,
        SPLITS=0 if parts is None else parts.shape[0],
        TERMS=terms,
        PIECE=piece,
        PIECES=-(-size // piece),
        HOPPER=launch.hopper,
        **launch_options(_MAKING_WARPS, launch),
    )


def join_attention(parts: Tensor, attended: Attended, vectors: Tensor, *, launch: Launch = PLAIN) -> None:
    """The vectors [b, terms, 1, d] of a product, written, from the parts of attention [b, s, h, e] float32."""
    b, splits, heads, head_size = parts.shape
    size = heads * head_size
    _join_attention[(b, -(-size // _JOINED_PIECE))](
        parts,
        attended.statistics,
        vectors,
        size,
        head_size,
        SPLITS=splits,
        TERMS=vectors.shape[1],
        PIECE=_JOINED_PIECE,
        HOPPER=launch.hopper,
        **launch_options(_JOINING_WARPS, launch),
    )


def multiply_batch(
    vectors: Tensor,
    matrix: Matrix,
    out: Tensor,
    *,
    alpha: float = 1.0,
    launch: Launch = PLAIN,
    tile: BatchTile,
) -> None:
    """``alpha * scale * (weight @ vector) + bias`` into ``out`` [k, b, p, rows] float32, of which it is the sum over k.

    Args:
        vectors: [b, terms, p or 1, columns] as :func:`make_vectors` leaves them, of the type that is multiplied.
        matrix: the weight.
        out: contiguous, k the splits of ``tile``.
        alpha: factor of the product.
        launch: how it is started.
        tile: how it is laid out.
    """
    projections, rows, columns = matrix.weight.shape
    b, terms, own_projections, _ = vectors.shape
    # no three programs that take more pieces than they hold have a place
    registers = _MOST_REGISTERS if tile.held < tile.pieces else REGISTERS_FOR_THREE
    _product[(projections * -(-rows // tile.rows), out.shape[0])](
        vectors,
        matrix.weight,
        matrix.scale,
        matrix.bias,
        out,
        rows,
        columns,
        own_projections * columns,
        columns if own_projections > 1 else 0,
        b,
        alpha,
        matrix.weight if launch.coming is None else launch.coming,
        0 if launch.coming is None else launch.coming.nbytes,
        SCALED=matrix.scale is not None,
        BIASED=matrix.bias is not None,
        TERMS=terms,
        ROWS=tile.rows,
        WIDTH=width_of(b * terms),
        PIECE=tile.piece,
        PIECES=tile.pieces,
        HELD=tile.held,
        STAGES=tile.stages,
        THREADS=32 * tile.warps,
        HOPPER=launch.hopper,
        **launch_options(tile.warps, launch, registers),
    )
