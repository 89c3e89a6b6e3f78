"""Tensors in float8 (e4m3) with their scales, copies of them as products need them, and such products, on a GPU.

A product takes both operands with the axis that it sums over as the last one, so most tensors are needed transposed as
well. Rows of inputs and gradients have a scale each. Where a product sums over these rows, one operand has the bytes of
its rows as they are, and the other one makes up for the scales of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
_TILE = {"ROWS": 128, "COLUMNS": 128, "num_warps": 8}  # of a transposition
_ROWS = 32  # of a program that transposes as it scales rows
_LARGEST_PIECE = 512  # of such a row
_BLOCK = 4096  # of tokens


class Rows(NamedTuple):
    """p matrices: in float8 [p, rows, features], the scales of their rows [p, rows], and the same bytes transposed
    [p, features, rows]."""

    rows: Tensor
    scales: Tensor
    transposed: Tensor


class Tokens(NamedTuple):
    """Keys [n, d_in] and values [n, d_out] in float8, both transposed; and what scales them back: the first numbers of
    the rows of ``scales`` [2, 4], which are 16 bytes for the sake of products."""

    key: Tensor
    key_transposed: Tensor
    value: Tensor
    value_transposed: Tensor
    scales: Tensor


def product(a: Tensor, b: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """``a b^T`` times the first of ``scale``, [m, k] and [n, k] to [m, n]; bfloat16, or as ``out`` is."""
    dtype = torch.bfloat16 if out is None else out.dtype
    if out is None:
        out = torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    torch._scaled_mm(
        a, b.t(), _one(a.device), scale[0], out_dtype=dtype, use_fast_accum=dtype == torch.bfloat16, out=out
    )
    return out


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def rows_to_float8(
    tensors: Sequence[Tensor], others: Tensor | None = None, largest: Tensor | None = None
) -> Rows:
    """p tensors [rows, features] in float8.

    Args:
        tensors: bfloat16; rows are a multiple of 16.
        others: scales [p, rows] of what is to be multiplied with these transposed copies.
        largest: [p, 4], zero; its first numbers become the largest products of a row's two scales, for
            :func:`transposed`.
    """
    from tokenformer.ops.pattention_float8_copies_triton import copy_rows

    p, (rows, features), device = len(tensors), tensors[0].shape, tensors[0].device
    found = Rows(
        torch.empty(p, rows, features, dtype=FLOAT8, device=device),
        torch.empty(p, rows, device=device),
        torch.empty(p, features, rows, dtype=FLOAT8, device=device),
    )
    piece = min(_LARGEST_PIECE, max(features & -features, 64))
    for i, tensor in enumerate(tensors):
        copy_rows[(-(-rows // _ROWS),)](
            tensor.contiguous(),
            others[i] if others is not None else None,
            largest[i] if largest is not None else None,
            found.rows[i].view(torch.uint8),
            found.transposed[i].view(torch.int32),
            found.scales[i],
            rows,
            COLUMNS=features,
            ROWS=_ROWS,
            PIECE=piece,
            WITH_OTHERS=others is not None,
            num_warps=8 if piece > 256 else 4,
        )
    return found


def transposed(quantized: Tensor, scales: Tensor, others: Tensor, largest: Tensor) -> Tensor:
    """[p, rows, features] with ``scales`` [p, rows] to [p, features, rows] with ``largest`` [p, 4] for all, in which
    the scales ``others`` [p, rows] of what it is to be multiplied with are contained."""
    from tokenformer.ops.pattention_float8_copies_triton import transpose_rows

    p, rows, features = quantized.shape
    copy = torch.empty(p, features, rows, dtype=FLOAT8, device=quantized.device)
    transpose_rows[(-(-features // _TILE["COLUMNS"]), -(-rows // _TILE["ROWS"]), p)](
        quantized, scales, others, largest, copy.view(torch.int32), rows, features, **_TILE
    )
    return copy


def turn(quantized: Tensor) -> Tensor:
    """[n, m] to [m, n], the same bytes."""
    return quantized.view(torch.uint8).t().contiguous().view(FLOAT8)


def tokens_to_float8(key: Tensor, value: Tensor) -> Tokens:
    """``key`` [n, d_in] and ``value`` [n, d_out], contiguous, in float8; n is a multiple of 16."""
    from tokenformer.ops.pattention_float8_copies_triton import copy_tokens, largest_of_tokens

    largest, scales = torch.zeros(2, 4, device=key.device), torch.empty(2, 4, device=key.device)
    blocks = sum(-(-tokens.numel() // _BLOCK) for tokens in (key, value))
    largest_of_tokens[(blocks,)](key, value, largest, key.numel(), value.numel(), BLOCK=_BLOCK)
    (copy, turned), (value_copy, value_turned) = (
        [torch.empty(size, dtype=FLOAT8, device=key.device) for size in (tokens.shape, tokens.shape[::-1])]
        for tokens in (key, value)
    )
    tiles = sum(-(-tokens.shape[1] // _TILE["COLUMNS"]) for tokens in (key, value))
    copy_tokens[(tiles * -(-key.shape[0] // _TILE["ROWS"]),)](
        key,
        value,
        largest,
        scales,
        copy.view(torch.uint8),
        turned.view(torch.int32),
        value_copy.view(torch.uint8),
        value_turned.view(torch.int32),
        key.shape[0],
        key.shape[1],
        value.shape[1],
        **_TILE,
    )
    return Tokens(copy, turned, value_copy, value_turned, scales)
