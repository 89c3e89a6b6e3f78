"""Pattention on the CPU, a block of rows at a time, so that everything between the products stays in cache.

The plain formula writes and reads several [rows, n] tensors through main memory; here only the scores, which the
backward needs, are stored. The function is :func:`tokenformer.ops.pattention.pattention_reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenformer.ops.pattention import WeightKind, attention_weights, norm_divisor

_BLOCK_ELEMENTS = 512 * 1024  # scores of one block: 2 MiB in float32
_gelu_backward = torch.ops.aten.gelu_backward


def applies(x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    """Whether the row-blocked path serves these tensors: float32 or float64 on a CPU, run eagerly."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.maybe_current_level()
    )


def pattention_row_blocks(
    x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], kind: WeightKind
) -> Tensor:
    """As :func:`tokenformer.ops.pattention.pattention`, for what :func:`applies` admits; differentiable once."""
    out: Tensor = _RowBlocks.apply(x.reshape(-1, x.shape[-1]), kind, len(keys), *keys, *values)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def attention_weights_backward(
    scores: Sequence[Tensor], weight_grads: Sequence[Tensor], kind: WeightKind
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights again, and the gradient of the scores; every argument and result one [rows, n_g] a group.

    With ``y = c s / (r + eps)``, ``r = |s|``: ``ds = c dy / (r + eps) - y (y . dy) / (c r)``.
    """
    approximate = kind.gelu_approximate
    if kind.norm_activation == "gelu":
        weights = attention_weights(scores, kind)
        return weights, _gelu_grads(weight_grads, scores, approximate)
    if kind.norm_activation == "softmax":
        weights = attention_weights(scores, kind)
        mean = _dot(weights, weight_grads) / kind.tau
        return weights, [(grad - mean).mul_(w) for w, grad in zip(weights, weight_grads, strict=True)]
    root = math.sqrt(kind.tau)
    if kind.norm_activation == "l2_norm_gelu":
        divisor = norm_divisor(scores, kind.norm_eps)
        normed = [(s / divisor).mul_(root) for s in scores]
        weights = [torch.nn.functional.gelu(z, approximate=approximate) for z in normed]
        return weights, _norm_grads(
            normed, _gelu_grads(weight_grads, normed, approximate), divisor, root, kind
        )
    activated = [torch.nn.functional.gelu(s, approximate=approximate) for s in scores]
    divisor = norm_divisor(activated, kind.norm_eps)
    weights = [g.div_(divisor).mul_(root) for g in activated]
    activated_grads = _norm_grads(weights, weight_grads, divisor, root, kind)
    return weights, _gelu_grads(activated_grads, scores, approximate)


def _gelu_grads(grads: Sequence[Tensor], inputs: Sequence[Tensor], approximate: str) -> list[Tensor]:
    return [_gelu_backward(g, s, approximate=approximate) for g, s in zip(grads, inputs, strict=True)]


def _norm_grads(
    normed: Sequence[Tensor], grads: Sequence[Tensor], divisor: Tensor, root: float, kind: WeightKind
) -> list[Tensor]:
    """Gradient of s, given y = ``normed`` and dy = ``grads``; ``divisor`` [rows, 1] is r + eps."""
    along = _dot(normed, grads) / (root * (divisor - kind.norm_eps))
    factor = root / divisor
    return [(grad * factor).addcmul_(y, along, value=-1) for y, grad in zip(normed, grads, strict=True)]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    total = torch.linalg.vecdot(left[0], right[0]).unsqueeze(-1)
    for a, b in zip(left[1:], right[1:], strict=True):
        total = total + torch.linalg.vecdot(a, b).unsqueeze(-1)
    return total


class _RowBlocks(torch.autograd.Function):
    """Inputs: x [rows, d_in], the kind, the number of groups, then all keys and all values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: WeightKind, groups: int, *tokens: Tensor) -> Tensor:
        keys, values = tokens[:groups], tokens[groups:]
        keep_scores = any(ctx.needs_input_grad)
        out = x.new_empty(x.shape[0], values[0].shape[1])
        all_scores = [x.new_empty(x.shape[0], k.shape[0]) for k in keys] if keep_scores else []
        for rows in _row_blocks(x.shape[0], sum(k.shape[0] for k in keys)):
            if keep_scores:
                scores = [
                    torch.mm(x[rows], k.t(), out=s[rows]) for k, s in zip(keys, all_scores, strict=True)
                ]
            else:
                scores = [torch.mm(x[rows], k.t()) for k in keys]
            weights = attention_weights(scores, kind)
            torch.mm(weights[0], values[0], out=out[rows])
            for group_weights, group in zip(weights[1:], values[1:], strict=True):
                out[rows].addmm_(group_weights, group)
        ctx.kind, ctx.groups = kind, groups
        ctx.save_for_backward(x, *tokens, *all_scores)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        groups = ctx.groups
        x, *rest = ctx.saved_tensors
        keys, values, scores = rest[:groups], rest[groups : 2 * groups], rest[2 * groups :]
        need_x, _, _, *need_tokens = ctx.needs_input_grad
        need_keys, need_values = need_tokens[:groups], need_tokens[groups:]
        grad_x = torch.empty_like(x) if need_x else None
        grad_keys = [torch.zeros_like(k) if need else None for k, need in zip(keys, need_keys, strict=True)]
        grad_values = [
            torch.zeros_like(v) if need else None for v, need in zip(values, need_values, strict=True)
        ]
        for rows in _row_blocks(x.shape[0], sum(k.shape[0] for k in keys)):
            grad_rows = grad_out[rows]
            weights, score_grads = attention_weights_backward(
                [s[rows] for s in scores], [grad_rows @ v.t() for v in values], ctx.kind
            )
            for g in range(groups):
                if (grad_value := grad_values[g]) is not None:
                    grad_value.addmm_(weights[g].t(), grad_rows)
                if (grad_key := grad_keys[g]) is not None:
                    grad_key.addmm_(score_grads[g].t(), x[rows])
            if grad_x is not None:
                torch.mm(score_grads[0], keys[0], out=grad_x[rows])
                for score_grad, key in zip(score_grads[1:], keys[1:], strict=True):
                    grad_x[rows].addmm_(score_grad, key)
        return grad_x, None, None, *grad_keys, *grad_values


def _row_blocks(rows: int, tokens: int) -> list[slice]:
    size = max(64, _BLOCK_ELEMENTS // tokens)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
