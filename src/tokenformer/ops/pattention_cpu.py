"""Pattention on the CPU, a block of rows at a time, so that everything between the products stays in cache.

The plain formula writes and reads several [rows, n] tensors through main memory; here only the scores, which the
backward needs, are stored, or not even they where it makes them again. The function is
:func:`tokenformer.ops.pattention.pattention_reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenformer.ops.pattention import GELU_SATURATION, WeightKind, attention_weights, gelu, row_norm

_BLOCK_ELEMENTS = 2048 * 1024  # scores of one block: 8 MiB in float32
_SAFE_SQUARES = (1e-30, 1e36)  # a float32 sum of squares in between has lost nothing that matters


def applies(x: Tensor) -> bool:
    """Whether the row-blocked path serves this input: float32 or float64 on a CPU, run eagerly."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.maybe_current_level()
    )


def pattention_row_blocks(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    kind: WeightKind,
    *,
    recompute_scores: bool = False,
) -> Tensor:
    """As :func:`tokenformer.ops.pattention.pattention`, for what :func:`applies` admits; differentiable once."""
    if not torch.is_grad_enabled():  # a Function cannot see that no gradient is wanted
        x, keys, values = x.detach(), [k.detach() for k in keys], [v.detach() for v in values]
    out: Tensor = _RowBlocks.apply(
        x.reshape(-1, x.shape[-1]), kind, recompute_scores, len(keys), *keys, *values
    )
    return out.reshape(*x.shape[:-1], out.shape[-1])


class _Stored(NamedTuple):
    """What the backward of a block needs: one [rows, n_g] for each group, and the norms [rows, 1] of the kinds that
    have one. The parts are the scores (``gelu``, ``gelu_l2_norm``), the argument of the GELU (``l2_norm_gelu``) or the
    weights (``softmax``)."""

    parts: list[Tensor]
    norm: Tensor | None


def weights_and_rest(scores: list[Tensor], kind: WeightKind) -> tuple[list[Tensor], _Stored]:
    """Weights of a block of rows, one [rows, n_g] a group, and what its backward needs; overwrites ``scores``."""
    if kind.norm_activation == "gelu":
        return _gelu(scores, kind), _Stored(scores, None)
    if kind.norm_activation == "softmax":
        weights = _softmax(scores, kind)
        return weights, _Stored(weights, None)
    if kind.norm_activation == "l2_norm_gelu":
        norm = _fast_row_norm(scores)
        _normalise(scores, norm, kind)
        return _gelu(scores, kind), _Stored(scores, norm)
    activated = _gelu(scores, kind)
    norm = _fast_row_norm(activated)
    _normalise(activated, norm, kind)
    return activated, _Stored(scores, norm)


def _stored_again(scores: list[Tensor], norm: Tensor | None, kind: WeightKind) -> _Stored:
    """What :func:`weights_and_rest` stored, from the scores, which are overwritten, and the norm."""
    if kind.norm_activation == "softmax":
        return _Stored(_softmax(scores, kind), None)
    if kind.norm_activation == "l2_norm_gelu":
        assert norm is not None
        _normalise(scores, norm, kind)
    return _Stored(scores, norm)


def weights_backward(
    stored: _Stored, weight_grads: list[Tensor], kind: WeightKind
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights again, and the gradient of the scores: two lists of one [rows, n_g] for each group.

    ``weight_grads``, one [rows, n_g] for each group, is overwritten.
    """
    parts, norm = stored
    if kind.norm_activation == "gelu":
        return _gelu(parts, kind), _gelu_backward(weight_grads, parts, kind)
    if kind.norm_activation == "softmax":
        mean = _dot(parts, weight_grads) / kind.tau
        return parts, [grad.sub_(mean).mul_(w) for w, grad in zip(parts, weight_grads, strict=True)]
    assert norm is not None
    if kind.norm_activation == "l2_norm_gelu":
        grads = _gelu_backward(weight_grads, parts, kind)
        return _gelu(parts, kind), _norm_backward(parts, grads, norm, kind)
    weights = _gelu(parts, kind)
    _normalise(weights, norm, kind)
    grads = _norm_backward(weights, weight_grads, norm, kind)
    return weights, _gelu_backward(grads, parts, kind)


def _gelu(parts: Sequence[Tensor], kind: WeightKind) -> list[Tensor]:
    return [gelu(part, kind.gelu_approximate) for part in parts]


def _gelu_backward(grads: Sequence[Tensor], inputs: Sequence[Tensor], kind: WeightKind) -> list[Tensor]:
    backward, approximate = torch.ops.aten.gelu_backward, kind.gelu_approximate
    if approximate == "tanh":  # saturated, see gelu()
        inputs = [s.clamp(-GELU_SATURATION, GELU_SATURATION) for s in inputs]
    return [backward(g, s, approximate=approximate) for g, s in zip(grads, inputs, strict=True)]


def _softmax(scores: list[Tensor], kind: WeightKind) -> list[Tensor]:
    if len(scores) == 1:
        return [torch.softmax(scores[0], dim=-1).mul_(kind.tau)]
    return attention_weights(scores, kind)


def _fast_row_norm(parts: Sequence[Tensor]) -> Tensor:
    """:func:`row_norm`, in one pass where no square can overflow or underflow."""
    squares = torch.linalg.vector_norm(parts[0], dim=-1, keepdim=True).square_()
    for part in parts[1:]:
        squares += torch.linalg.vector_norm(part, dim=-1, keepdim=True).square_()
    if bool(((squares > _SAFE_SQUARES[0]) & (squares < _SAFE_SQUARES[1])).all()):
        return squares.sqrt_()
    return row_norm(parts)


def _normalise(parts: Sequence[Tensor], norm: Tensor, kind: WeightKind) -> None:
    """``sqrt(tau) part / (norm + eps)``, in place."""
    root = math.sqrt(kind.tau)
    factor = root / (norm + kind.norm_eps)
    if bool(factor.isfinite().all()):
        for part in parts:
            part.mul_(factor)
    else:
        for part in parts:
            part.div_(norm + kind.norm_eps).mul_(root)


def _norm_backward(
    normed: Sequence[Tensor], grads: Sequence[Tensor], norm: Tensor, kind: WeightKind
) -> list[Tensor]:
    """Gradient through :func:`_normalise`; ``grads`` is overwritten.

    With y = c s / (r + eps), r = |s|, c = sqrt(tau): ds = c dy / (r + eps) - y (y . dy) / (c r).
    """
    along = _dot(normed, grads).div_(norm).div_(math.sqrt(kind.tau))
    _normalise(grads, norm, kind)
    return [grad.addcmul_(y, along, value=-1) for y, grad in zip(normed, grads, strict=True)]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Sum of the products over all tokens, [rows, 1]."""
    total = torch.linalg.vecdot(left[0], right[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        total += torch.linalg.vecdot(a, b)
    return total[:, None]


class _RowBlocks(torch.autograd.Function):
    """Inputs: x [rows, d_in], the kind, whether scores are made again in the backward, the number of groups, then all
    keys and all values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kind: WeightKind, recompute_scores: bool, groups: int, *tokens: Tensor
    ) -> Tensor:
        keys, values = tokens[:groups], tokens[groups:]
        keep = any(ctx.needs_input_grad)
        kept: list[Tensor | None] = []
        out = x.new_empty(x.shape[0], values[0].shape[1])
        for rows in _row_blocks(x.shape[0], sum(k.shape[0] for k in keys)):
            weights, stored = weights_and_rest([torch.mm(x[rows], k.t()) for k in keys], kind)
            _sum_of_products(weights, values, out[rows])
            if keep:
                kept += [*(() if recompute_scores else stored.parts), stored.norm]
        ctx.kind, ctx.recompute_scores, ctx.groups = kind, recompute_scores, groups
        ctx.save_for_backward(x, *tokens, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        groups = ctx.groups
        x, *rest = ctx.saved_tensors
        keys, values, kept = rest[:groups], rest[groups : 2 * groups], iter(rest[2 * groups :])
        need_x, _, _, _, *need_tokens = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if need_x else None
        grads = [
            torch.zeros_like(token) if need else None
            for token, need in zip((*keys, *values), need_tokens, strict=True)
        ]
        for rows in _row_blocks(x.shape[0], sum(k.shape[0] for k in keys)):
            if ctx.recompute_scores:
                stored = _stored_again([torch.mm(x[rows], k.t()) for k in keys], next(kept), ctx.kind)
            else:
                stored = _Stored(list(islice(kept, groups)), next(kept))
            grad_rows = grad_out[rows]
            weights, score_grads = weights_backward(stored, [grad_rows @ v.t() for v in values], ctx.kind)
            _add_products(grads[:groups], score_grads, x[rows])
            _add_products(grads[groups:], weights, grad_rows)
            if grad_x is not None:
                _sum_of_products(score_grads, keys, grad_x[rows])
        return grad_x, None, None, None, *grads


def _sum_of_products(rows: Sequence[Tensor], tokens: Sequence[Tensor], out: Tensor) -> None:
    """``out = sum_g rows_g tokens_g``: [rows, n_g] and [n_g, features] to [rows, features]."""
    torch.mm(rows[0], tokens[0], out=out)
    for part, group in zip(rows[1:], tokens[1:], strict=True):
        out.addmm_(part, group)


def _add_products(totals: Sequence[Tensor | None], rows: Sequence[Tensor], inputs: Tensor) -> None:
    """``totals_g += rows_g^T inputs``, for the groups that are trained."""
    for total, part in zip(totals, rows, strict=True):
        if total is not None:
            total.addmm_(part.t(), inputs)


def _row_blocks(rows: int, tokens: int) -> list[slice]:
    size = max(64, _BLOCK_ELEMENTS // tokens)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
