"""Tensors in float8 (e4m3) with their scales, copies of them as products need them, and such products, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
_TILE = (128, 128)  # of a transposition: 16 bytes for each of 8 threads, both ways
_SMALL_TILE = (128, 64)
_FEW_TILES = 512  # fewer leave multiprocessors without enough to wait for
_TILE_WARPS = 4
_BLOCK = 16384  # of tokens, for one largest entry
_BLOCK_WARPS = 8


def product(
    a: Tensor, b: Tensor, scale_b: Tensor, scale_a: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``a b^T`` times the scales, [m, k] and [n, k] to [m, n]; bfloat16, or as ``out`` is."""
    scale_a = _one(a.device) if scale_a is None else scale_a[0]
    dtype = torch.bfloat16 if out is None else out.dtype
    if out is None:
        out = torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    torch._scaled_mm(
        a, b.t(), scale_a, scale_b[0], out_dtype=dtype, use_fast_accum=dtype == torch.bfloat16, out=out
    )
    return out


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def rows_to_float8(tensors: Sequence[Tensor], largest_scale: Tensor) -> tuple[Tensor, Tensor]:
    """p tensors [rows, features] in float8 [p, rows, features], and the scales of their rows [p, rows]."""
    from tokenformer.ops.pattention_float8_copies_triton import quantize_rows

    rows, features = tensors[0].shape
    quantized = torch.empty(len(tensors), rows, features, dtype=FLOAT8, device=tensors[0].device)
    scales = torch.empty(len(tensors), rows, device=tensors[0].device)
    block = 1 << (features - 1).bit_length()
    for start in range(0, len(tensors), 3):
        some = [tensor.contiguous() for tensor in tensors[start : start + 3]]
        quantize_rows[(rows, len(some))](
            *(some + 2 * some[:1])[:3],
            quantized[start:],
            scales[start:],
            largest_scale,
            features,
            BLOCK=block,
            num_warps=max(1, min(8, block // 2048)),  # so that few wait for each other
        )
    return quantized, scales


def transposed(quantized: Tensor, scales: Tensor | None = None, largest: Tensor | None = None) -> Tensor:
    """[p, rows, features] to [p, features, rows], from ``scales`` [p, rows] to the largest for all, or as they are;
    rows and features are multiples of 16."""
    return _transposed([(quantized, scales, largest)])[0]


def both_transposed(
    first: tuple[Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    """As :func:`transposed`, of two with equally many rows at once."""
    return _transposed([first, second])


def _transposed(matrices: Sequence[tuple[Tensor, Tensor | None, Tensor | None]]) -> list[Tensor]:
    from tokenformer.ops.pattention_float8_copies_triton import transpose_rows

    p, rows, _ = matrices[0][0].shape
    widths = [quantized.shape[2] for quantized, _, _ in matrices]
    copies = [torch.empty(p, w, rows, dtype=FLOAT8, device=matrices[0][0].device) for w in widths]
    arguments = [
        (_words(quantized), scales, largest, _words(copy), width)
        for (quantized, scales, largest), copy, width in zip(matrices, copies, widths, strict=True)
    ]
    tile = _TILE if p * prod(_grid(rows, widths, _TILE)) >= _FEW_TILES else _SMALL_TILE
    transpose_rows[(*_grid(rows, widths, tile), p)](
        *arguments[0],
        *arguments[-1],
        rows,
        SCALED=matrices[0][1] is not None,
        ROWS=tile[0],
        COLUMNS=tile[1],
        num_warps=_TILE_WARPS,
    )
    return copies


def tokens_to_float8(keys: Tensor, values: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys [n, d_in] and values [n, d_out], bfloat16, in float8: keys, keys transposed, values, values transposed.
    The first rows of ``table`` [8, 4] become the scales of both; all others become zeros, whatever they were."""
    from tokenformer.ops.pattention_float8_copies_triton import find_largest, quantize_tokens

    n, widths = keys.shape[0], (keys.shape[1], values.shape[1])
    blocks = -(-n * max(widths) // _BLOCK)
    largest = torch.empty(2, blocks, device=keys.device)
    find_largest[blocks, 2](
        keys,
        values,
        largest,
        table,
        keys.numel(),
        values.numel(),
        BLOCK=_BLOCK,
        TABLE=table.numel(),
        num_warps=_BLOCK_WARPS,
    )
    key, value = (torch.empty(n, width, dtype=FLOAT8, device=keys.device) for width in widths)
    key_copy, value_copy = (torch.empty(width, n, dtype=FLOAT8, device=keys.device) for width in widths)
    quantize_tokens[_grid(n, widths, _SMALL_TILE)](
        _words(keys),
        largest[0],
        table[0],
        _words(key),
        _words(key_copy),
        widths[0],
        _words(values),
        largest[1],
        table[1],
        _words(value),
        _words(value_copy),
        widths[1],
        n,
        blocks,
        MOST=1 << (blocks - 1).bit_length(),
        ROWS=_SMALL_TILE[0],
        COLUMNS=_SMALL_TILE[1],
        num_warps=2 * _TILE_WARPS,  # 16 bytes of bfloat16 for each thread
    )
    return key, key_copy, value, value_copy


def _words(matrix: Tensor) -> Tensor:
    """Four numbers in each: float8 in 32 bits, bfloat16 in 64."""
    matrix = matrix.clone() if matrix.storage_offset() % 4 else matrix
    return matrix.view(torch.int32 if matrix.dtype == FLOAT8 else torch.int64)


def _grid(rows: int, widths: Sequence[int], tile: tuple[int, int]) -> tuple[int, int]:
    """Tiles of the rows, and of the columns of all matrices."""
    return -(-rows // tile[0]), sum(-(-width // tile[1]) for width in widths)
