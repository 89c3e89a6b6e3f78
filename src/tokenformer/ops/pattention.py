"""Pattention: attention between input tokens and learned parameter tokens (arXiv 2410.23168, eq. 2 to 4).

``scores = x K^T`` (no 1/sqrt(d)), weights by kind, output ``weights V``, with tau a stored scale (n at first):

- ``gelu``: ``gelu(s)``
- ``l2_norm_gelu``: ``gelu(sqrt(tau) s / |s|)``
- ``gelu_l2_norm``: ``sqrt(tau) g / |g|`` with ``g = gelu(s)``
- ``softmax``: ``tau softmax(s)``

Parameter tokens come in groups (one for each growth stage). Groups meet only in the row norms, and in the sum of
their outputs: a group with zero keys therefore changes no bit of the result, and a frozen group costs no
weight-gradient product. Norms and softmax run in float32 (float64 for float64).

Row norms are scaled by the largest entry, so they neither overflow nor underflow. A row whose scores are all zero
has weights and gradient zero, where the plain formula gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokenformer.ops.autocast import autocast_dtype, without_autocast

NormActivation = Literal["gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax"]
NORM_ACTIVATIONS: tuple[NormActivation, ...] = ("gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax")
GELU_SATURATION = 30.0
"""Beyond it GELU is 0 or its argument, and its gradient 0 or 1, in float64 too."""


class WeightKind(NamedTuple):
    """Which function turns scores into weights. ``norm_eps`` is added to the L2 norms."""

    norm_activation: NormActivation
    tau: float
    gelu_approximate: Literal["none", "tanh"] = "none"
    norm_eps: float = 0.0


class RowReductions(NamedTuple):
    """How a figure of each row ([..., 1], float32) becomes that of the whole row where the parameter tokens at hand are
    a part of the layer's. ``total`` must be differentiable; ``largest`` is never differentiated."""

    largest: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]


def _as_it_is(figure: Tensor) -> Tensor:
    return figure


WHOLE_ROWS = RowReductions(_as_it_is, _as_it_is)
"""Every parameter token of the layer is at hand."""


def pattention(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    kind: WeightKind,
    rows: RowReductions = WHOLE_ROWS,
    *,
    recompute_scores: bool = False,
) -> Tensor:
    """Attention of ``x`` over the parameter tokens of all groups, on the fastest path that applies.

    Args:
        x: [..., d_in].
        keys: one [n_g, d_in] for each group g.
        values: one [n_g, d_out] for each group g.
        kind: the weight function.
        rows: for parameter tokens that are a part of the layer's; the result is then that part's share of the output.
        recompute_scores: keep no scores for the backward, which makes them again by one product more. Results and
            gradients stay the same.

    Returns:
        [..., d_out], in the dtype of ``x``, or in autocast's where that is on. float16 is computed in float32
        inside, since scores can leave its range where the result does not.
    """
    return pattention_projections(x, [keys], [values], kind, rows, recompute_scores=recompute_scores)[0]


def pattention_projections(
    x: Tensor,
    keys: Sequence[Sequence[Tensor]],
    values: Sequence[Sequence[Tensor]],
    kind: WeightKind,
    rows: RowReductions = WHOLE_ROWS,
    *,
    recompute_scores: bool = False,
) -> list[Tensor]:
    """:func:`pattention` of one input over several sets of parameter tokens, which share products where that pays.

    Args:
        x: [..., d_in].
        keys: for each projection one [n_g, d_in] for each group g; n, the sum over the groups, is the same in all.
        values: for each projection one [n_g, d_out] for each group g.
        kind: the weight function of all projections.
        rows: as for :func:`pattention`.
        recompute_scores: as for :func:`pattention`.

    Returns:
        One [..., d_out] for each projection.
    """
    dtype = autocast_dtype(x)
    compute = torch.float32 if dtype == torch.float16 else dtype
    with without_autocast(x.device.type):
        x = x.to(compute)
        has_whole_rows = rows is WHOLE_ROWS or kind.norm_activation == "gelu"  # which looks at no other token
        if has_whole_rows and x.device.type == "cuda":
            from tokenformer.ops import pattention_cuda

            if pattention_cuda.applies(x):
                fused = pattention_cuda.pattention_fused(
                    x, keys, values, kind, recompute_scores=recompute_scores
                )
                return [out.to(dtype) for out in fused]
        keys = [[group.to(compute) for group in projection] for projection in keys]
        values = [[group.to(compute) for group in projection] for projection in values]
        from tokenformer.ops import pattention_cpu

        if has_whole_rows and pattention_cpu.applies(x):
            path = partial(pattention_cpu.pattention_row_blocks, recompute_scores=recompute_scores)
        elif recompute_scores and torch.is_grad_enabled():
            path = partial(_recomputing_reference, rows=rows)
        else:
            path = partial(pattention_reference, rows=rows)
        return [path(x, k, v, kind).to(dtype) for k, v in zip(keys, values, strict=True)]


def pattention_reference(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    kind: WeightKind,
    rows: RowReductions = WHOLE_ROWS,
) -> Tensor:
    """The definition, in plain differentiable tensor operations; arguments as for :func:`pattention`."""
    scores = [F.linear(x, group) for group in keys]
    weights = attention_weights(scores, kind, rows)
    out = weights[0].to(x.dtype) @ values[0]
    for group_weights, group in zip(weights[1:], values[1:], strict=True):
        out = out + group_weights.to(x.dtype) @ group
    return out


def _recomputing_reference(
    x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], kind: WeightKind, rows: RowReductions
) -> Tensor:
    """The same, of which autograd keeps the arguments alone: scores and weights are made again in the backward."""

    groups = len(keys)

    def reference(x: Tensor, *tokens: Tensor) -> Tensor:
        return pattention_reference(x, tokens[:groups], tokens[groups:], kind, rows)

    out: Tensor = checkpoint(reference, x, *keys, *values, use_reentrant=False, preserve_rng_state=False)
    return out


def attention_weights(
    scores: Sequence[Tensor], kind: WeightKind, rows: RowReductions = WHOLE_ROWS
) -> list[Tensor]:
    """Weights of every parameter token.

    Args:
        scores: one [..., n_g] for each group.
        kind: the weight function; norms and sums run over the tokens of all groups.
        rows: as for :func:`pattention`.

    Returns:
        One [..., n_g] for each group, float32 (float64 for float64 scores).
    """
    wide = [s if s.dtype == torch.float64 else s.float() for s in scores]
    if kind.norm_activation == "softmax":
        largest = rows.largest(
            _largest([s.detach() for s in wide])
        )  # cancels, so no gradient goes through it
        exponentials = [torch.exp(s - largest) for s in wide]
        total = rows.total(_sum_over_groups(exponentials))
        return [e / total * kind.tau for e in exponentials]
    if kind.norm_activation == "gelu":
        return [gelu(s, kind.gelu_approximate) for s in wide]
    root = math.sqrt(kind.tau)
    if kind.norm_activation == "l2_norm_gelu":
        divisor = row_norm(wide, rows) + kind.norm_eps
        return [gelu(s / divisor * root, kind.gelu_approximate) for s in wide]
    activated = [gelu(s, kind.gelu_approximate) for s in wide]
    divisor = row_norm(activated, rows) + kind.norm_eps
    return [g / divisor * root for g in activated]


def gelu(scores: Tensor, approximate: str) -> Tensor:
    """GELU, finite with a finite gradient for every finite score."""
    if approximate == "none":
        return F.gelu(scores)
    # torch's gradient of the tanh form squares its argument, which overflows to NaN where the gradient is 0 or 1
    bounded = scores.clamp(-GELU_SATURATION, GELU_SATURATION)
    return torch.where(scores > GELU_SATURATION, scores, F.gelu(bounded, approximate=approximate))


def row_norm(parts: Sequence[Tensor], rows: RowReductions = WHOLE_ROWS) -> Tensor:
    """``|row|`` over all groups, [..., 1]; infinite where the row is zero, so that the quotient and its gradient
    are zero there."""
    largest = rows.largest(_largest([part.detach().abs() for part in parts]))
    scale = torch.where(largest > 0, largest, 1.0)
    squares = rows.total(_sum_over_groups([(part / scale).square() for part in parts]))
    nonzero = squares > 0
    norm = scale * torch.where(nonzero, squares, 1.0).sqrt()
    return torch.where(nonzero, norm, torch.inf)


def _largest(parts: Sequence[Tensor]) -> Tensor:
    largest = parts[0].amax(-1, keepdim=True)
    for part in parts[1:]:
        largest = torch.maximum(largest, part.amax(-1, keepdim=True))
    return largest


def _sum_over_groups(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].sum(-1, keepdim=True)
    for part in parts[1:]:
        total = total + part.sum(-1, keepdim=True)
    return total
