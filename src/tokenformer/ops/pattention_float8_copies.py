"""Tensors in float8 (e4m3) with their scales, copies of them as products need them, and such products, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
_TILE = (128, 128)  # of a transposition: 16 bytes for each of 8 threads, both ways
_SMALL_TILE = (128, 64)
_FEW_TILES = 512  # fewer leave multiprocessors without enough to wait for
_TILE_WARPS = 4
_BLOCK = 4096  # of tokens


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
    for tensor, place, of_rows in zip(tensors, quantized, scales, strict=True):
        quantize_rows[(rows,)](
            tensor.contiguous(), place, of_rows, largest_scale, features, BLOCK=block, num_warps=4
        )
    return quantized, scales


def transposed(
    quantized: Tensor, scales: Tensor | None = None, largest_scale: Tensor | None = None
) -> Tensor:
    """[p, rows, features] to [p, features, rows], from ``scales`` [p, rows] to one for all, or as they are; rows and
    features are multiples of 16."""
    from tokenformer.ops.pattention_float8_copies_triton import transpose_rows

    p, rows, features = quantized.shape
    copy = torch.empty(p, features, rows, dtype=FLOAT8, device=quantized.device)
    tile = _TILE if p * -(-rows // _TILE[0]) * -(-features // _TILE[1]) >= _FEW_TILES else _SMALL_TILE
    transpose_rows[(-(-rows // tile[0]), -(-features // tile[1]), p)](
        quantized.view(torch.int32),
        scales,
        largest_scale,
        copy.view(torch.int32),
        rows,
        features,
        SCALED=scales is not None,
        ROWS=tile[0],
        COLUMNS=tile[1],
        num_warps=_TILE_WARPS,
    )
    return copy


def tokens_to_float8(tokens: Tensor, numbers: Tensor, largest: int, scale: int) -> tuple[Tensor, Tensor]:
    """``tokens`` [n, features] in float8, and transposed; fills two rows of the table."""
    from tokenformer.ops.pattention_float8_copies_triton import find_largest, quantize_tokens

    n, features = tokens.shape
    quantized = torch.empty(n, features, dtype=FLOAT8, device=tokens.device)
    grid = (-(-tokens.numel() // _BLOCK),)
    find_largest[grid](tokens, numbers[largest], tokens.numel(), BLOCK=_BLOCK)
    quantize_tokens[grid](
        tokens,
        numbers[largest],
        numbers[scale],
        quantized,
        tokens.numel(),
        BLOCK=_BLOCK,
    )
    return quantized, transposed(quantized[None])[0]
