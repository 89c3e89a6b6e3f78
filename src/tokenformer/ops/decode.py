"""Products of one token at a time on a GPU: which kernel, and how it is laid out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenformer.ops.decode_attention_triton import attend
from tokenformer.ops.decode_triton import ATTENTION, LAYER_NORM, SCORES, embed, gemv
from tokenformer.ops.pattention import NORM_ACTIVATIONS, WeightKind

KEYS_A_BLOCK = 64
_ATTENTION_WARPS = 8
_TILE_ELEMENTS = 24576
REGISTERS_FOR_THREE = 168  # of a thread, where three programs of four warps are to fit on a multiprocessor
_GELU = WeightKind("gelu", 1.0)


class Matrix(NamedTuple):
    """A weight as the kernels read it: ``weight`` [p, rows, columns], contiguous; ``scale`` [p, rows] float32 where the
    weight is int8; ``bias`` [p, rows]."""

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None


class Normed(NamedTuple):
    """The vector is the layer norm of the source [b, d]."""

    eps: float
    gain: Tensor | None = None
    shift: Tensor | None = None


class Weighed(NamedTuple):
    """The vectors are Pattention's weights from the scores [b, p, n] that :func:`multiply` stored with ``activate``."""

    kind: WeightKind


class Attended(NamedTuple):
    """The vector is attention from the parts of it, [b, s, h, e], that :func:`attention` left, and their statistics."""

    statistics: Tensor


class Tile(NamedTuple):
    """How a product is laid out: rows a program, columns of a piece, warps."""

    rows: int
    piece: int
    warps: int


class Launch(NamedTuple):
    """How a kernel is started: on a Hopper GPU before the kernel before it has ended, and asking for the bytes of
    ``coming`` (a multiple of 16) to be brought into the cache for later ones."""

    hopper: bool = False
    coming: Tensor | None = None


PLAIN = Launch()


def choose_tile(rows: int, columns: int, element_size: int) -> Tile:
    """For a matrix [rows, columns] and programs that hold a tile in registers: as large as keeps all 132
    multiprocessors of a Hopper GPU at work, or nearly; more warps for large tiles with one program on each."""
    piece = min(1 << max(4, (columns - 1).bit_length()), 1024)
    if columns % 512 == 0 and columns % 1024:
        piece = 512
    elif columns % 256 == 0 and columns % 512:
        piece = 256
    padded = -(-columns // piece) * piece
    tile_rows = 16
    most = _TILE_ELEMENTS if element_size <= 2 else _TILE_ELEMENTS // 2
    while tile_rows > 1 and (tile_rows * padded > most or rows < 96 * tile_rows):
        tile_rows //= 2
    is_large = tile_rows * padded > most // 2 and (rows <= 132 * tile_rows or tile_rows == 1)
    return Tile(tile_rows, piece, 8 if is_large else 4)


def multiply(
    source: Tensor,
    how: Normed | Weighed | Attended,
    matrix: Matrix,
    out: Tensor,
    *,
    activate: WeightKind | None = None,
    residual: bool = False,
    alpha: float = 1.0,
    launch: Launch = PLAIN,
    tile: Tile | None = None,
) -> None:
    """``alpha * scale * (weight @ vector) + bias`` into ``out`` [b, p, rows] float32, or added to it.

    Args:
        source: what ``how`` makes the vectors of, float32.
        how: the vectors.
        matrix: the weight.
        out: [b, p, rows] float32, contiguous.
        activate: the kind of the Pattention whose scores these are, whose GELU is taken here where it comes first.
        residual: add to ``out``.
        alpha: factor of the product.
        launch: how it is started.
        tile: how it is laid out, for measurements.
    """
    projections, rows, columns = matrix.weight.shape
    tile = tile or choose_tile(projections * rows, columns, matrix.weight.element_size())
    kind = how.kind if isinstance(how, Weighed) else activate or _GELU
    norm = how if isinstance(how, Normed) else Normed(0.0)
    statistics = how.statistics if isinstance(how, Attended) else source
    splits, heads = (statistics.shape[1], statistics.shape[2]) if isinstance(how, Attended) else (1, 1)
    gemv[(projections * -(-rows // tile.rows),)](
        source,
        statistics,
        matrix.weight,
        matrix.scale,
        matrix.bias,
        norm.gain,
        norm.shift,
        out,
        rows,
        columns,
        projections * columns if isinstance(how, Weighed) else columns,
        columns // heads,
        norm.eps,
        kind.tau**0.5,
        kind.tau,
        kind.norm_eps,
        alpha,
        matrix.weight if launch.coming is None else launch.coming,
        0 if launch.coming is None else launch.coming.nbytes,
        INPUT=(
            SCORES if isinstance(how, Weighed) else ATTENTION if isinstance(how, Attended) else LAYER_NORM
        ).value,
        KIND=NORM_ACTIVATIONS.index(kind.norm_activation),
        TANH=kind.gelu_approximate == "tanh",
        EXACT=matrix.weight.dtype == torch.float32,
        AFFINE=norm.gain is not None,
        SCALED=matrix.scale is not None,
        BIASED=matrix.bias is not None,
        ACTIVATE=activate is not None and activate.norm_activation in ("gelu", "gelu_l2_norm"),
        RESIDUAL=residual,
        SPLITS=splits,
        BATCH=out.shape[0],
        ROWS=tile.rows,
        PIECE=tile.piece,
        PIECES=-(-columns // tile.piece),
        THREADS=32 * tile.warps,
        HOPPER=launch.hopper,
        **launch_options(tile.warps, launch),
    )


def attention(
    qkv: Tensor,
    cache: tuple[Tensor, Tensor],
    angles: tuple[Tensor, Tensor],
    lengths: Tensor,
    starts: Tensor,
    positions: Tensor,
    out: Tensor,
    statistics: Tensor | None,
    *,
    launch: Launch = PLAIN,
) -> None:
    """Attention of one token over the cache, in parts that :class:`Attended` puts together, or whole.

    Args:
        qkv: [k, b, 3, d] float32, k parts whose sum it is, before rotary.
        cache: keys and values [b, h, T, e]; this token's are written into them.
        angles: cosine and sine [T, r] float32, r = 0 for no rotary.
        lengths: [1] integers, tokens in the cache.
        starts: [b] integers, the first of them that is no padding.
        positions: [b] integers, of this token.
        out: [b, s, h, e] float32; without statistics [b, terms, 1, d], the terms of the vectors.
        statistics: [b, s, h] float32.
        launch: how it is started.
    """
    batch, heads, capacity, head_size = cache[0].shape
    attend[(heads, 1 if statistics is None else out.shape[1], batch)](
        qkv,
        *cache,
        *angles,
        lengths,
        starts,
        positions,
        out,
        out if statistics is None else statistics,
        capacity,
        head_size,
        head_size**-0.5,
        qkv if launch.coming is None else launch.coming,
        0 if launch.coming is None else launch.coming.nbytes,
        PARTS=qkv.shape[0],
        TERMS=out.shape[1] if statistics is None else 0,
        ROTARY=angles[0].shape[-1],
        FEATURES=max(16, 1 << (head_size - 1).bit_length()),
        BLOCK=KEYS_A_BLOCK,
        THREADS=32 * _ATTENTION_WARPS,
        HOPPER=launch.hopper,
        **launch_options(_ATTENTION_WARPS, launch),
    )


def look_up(tokens: Tensor, table: Tensor, out: Tensor, *, launch: Launch = PLAIN) -> None:
    """Rows ``tokens`` [b, 1] of ``table`` [v, d] into ``out`` [b, 1, d] float32."""
    batch, hidden = out.shape[0], out.shape[-1]
    grid = (batch, -(-hidden // 1024))
    options = {"HOPPER": launch.hopper, **launch_options(4, launch)}
    embed[grid](tokens, table, out, hidden, BLOCK=1024, **options)


def launch_options(warps: int, launch: Launch, registers: int = REGISTERS_FOR_THREE) -> dict[str, Any]:
    """What a kernel that asks for its weights before it waits is compiled and launched with; at most so many registers
    a thread, where it has four warps."""
    if not launch.hopper:
        return {"num_warps": warps}
    options = {"num_warps": warps, "launch_pdl": True}
    return options | {"maxnreg": registers} if warps == 4 else options
