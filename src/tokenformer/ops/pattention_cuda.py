"""Pattention on a GPU: matrix products of the vendor's library, one Triton pass between them each way.

Saved for the backward are the input, the tokens, the scores and two numbers a row; the weights are computed again in
the pass that makes the gradient of the scores. With ``recompute_scores`` the scores are not saved either: the backward
begins with their product, and writes the weights in their place. (Weights of softmax would do in place of its scores,
for a transfer less; but they lose by rounding to bfloat16, which the scores have gone through already.) Several
projections of one input share the product that gives their scores, and the groups of a projection are one matrix, so
neither costs launches of its own. The function is :func:`tokenformer.ops.pattention.pattention_reference`; as operators
of torch they are opaque to ``torch.compile``, which fuses what is around them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenformer.ops.pattention import WeightKind
from tokenformer.ops.token_groups import gradients_of_groups, one_matrix


def applies(x: Tensor) -> bool:
    """Whether these operators serve this input: bfloat16 or float32 on a GPU that has bfloat16, and Triton is there."""
    return (
        _SERVES_DEVICES
        and x.device.type == "cuda"
        and x.dtype in (torch.bfloat16, torch.float32)
        and (torch.compiler.is_compiling() or not torch._C._functorch.maybe_current_level())
    )


def _serves_devices() -> bool:
    if importlib.util.find_spec("triton") is None or torch.version.cuda is None:
        return False
    devices = range(torch.cuda.device_count())
    return all(torch.cuda.get_device_capability(index) >= (8, 0) for index in devices)


_SERVES_DEVICES = _serves_devices()  # once: a compiled caller cannot ask


def pattention_fused(
    x: Tensor,
    keys: Sequence[Sequence[Tensor]],
    values: Sequence[Sequence[Tensor]],
    kind: WeightKind,
    *,
    recompute_scores: bool = False,
) -> list[Tensor]:
    """Several projections of one input, for what :func:`applies` admits; differentiable once.

    Args:
        x: [..., d_in].
        keys: for each projection one [n_g, d_in] for each group g; n, the sum over the groups, is the same in all.
            Products take them in the dtype of ``x``; gradients of float32 tokens are never rounded to that.
        values: for each projection one [n_g, d_out] for each group g.
        kind: the weight function of all projections.
        recompute_scores: keep no scores for the backward, which makes them again.

    Returns:
        [..., d_out] for each projection.
    """
    flat_keys, flat_values = (
        [group for projection in tokens for group in projection] for tokens in (keys, values)
    )
    leaves = (x, *flat_keys, *flat_values)
    outputs, *_ = pattention_forward(
        x.reshape(-1, x.shape[-1]),
        one_matrix(flat_keys, x.dtype),
        one_matrix(flat_values, x.dtype),
        flat_keys,
        flat_values,
        len(values),
        *kind,
        torch.is_grad_enabled() and any(t.requires_grad for t in leaves),
        recompute_scores,
    )
    return [out.reshape(*x.shape[:-1], out.shape[-1]) for out in outputs]


@torch.library.custom_op("tokenformer::pattention_forward", mutates_args=())
def pattention_forward(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    projections: int,
    norm_activation: str,
    tau: float,
    gelu_approximate: str,
    norm_eps: float,
    keep: bool,
    recompute_scores: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """p projections of ``x`` [rows, d_in]; ``key`` [p * n, d_in] and ``value`` [p * n, d_out] are the tokens, in the
    dtype of ``x``, of ``keys`` and ``values`` (p * g groups), which stand for them in autograd alone.

    Returns p outputs [rows, d_out], and for the backward the scores [rows * p, n] and their statistics [rows * p, 2];
    both empty unless ``keep``, the scores also with ``recompute_scores``.
    """
    from tokenformer.ops import pattention_sm90
    from tokenformer.ops.pattention_rows import weights_forward

    n = key.shape[0] // projections
    kind = _kind(norm_activation, tau, gelu_approximate, norm_eps)
    scores: Tensor | None
    if keep and pattention_sm90.serves(x, key, n, kind, backward=False):
        scores, weights, statistics = pattention_sm90.scores_and_weights(
            x, key, projections, kind, keep_scores=not recompute_scores
        )
    else:
        scores = torch.mm(x, key.t()).view(-1, n)
        weights, statistics = weights_forward(scores, kind, keep=keep and not recompute_scores)
    nothing, no_statistics = _nothing_kept(x)
    if scores is None or recompute_scores or not keep:
        scores = nothing  # before the outputs take memory
    by_projection = weights.view(-1, projections, n).unbind(1)
    outputs = [torch.mm(*pair) for pair in zip(by_projection, value.view(projections, n, -1), strict=True)]
    return outputs, scores, statistics if keep else no_statistics


@torch.library.custom_op("tokenformer::pattention_backward", mutates_args=())
def pattention_backward(
    grads: list[Tensor],
    x: Tensor,
    scores: Tensor | None,
    statistics: Tensor,
    key: Tensor,
    value: Tensor,
    norm_activation: str,
    tau: float,
    gelu_approximate: str,
    norm_eps: float,
    need_x: bool,
    key_spans: list[int],
    value_spans: list[int],
    key_dtype: torch.dtype,
    value_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, key and value from ``grads``, p times [rows, d_out]; of the tokens only within the spans
    [start, stop, start, stop, ...], arbitrary elsewhere; empty where none is wanted. ``scores`` are None where they
    were not kept."""
    projections, n = len(grads), key.shape[0] // len(grads)
    kind = _kind(norm_activation, tau, gelu_approximate, norm_eps)
    keep = scores is not None
    if scores is None:
        scores = torch.mm(x, key.t()).view(-1, n)
    weights, score_grads = _through_weights(grads, scores, statistics, value, kind, keep=keep)
    del scores
    value_grad = x.new_empty(value.shape if value_spans else 0, dtype=value_dtype)
    columns = weights.view(-1, projections, n)
    for start, stop in zip(value_spans[::2], value_spans[1::2], strict=True):
        p, first = divmod(start, n)
        part = columns[:, p, first : first + stop - start]
        _product(part.t(), grads[p], out=value_grad[start:stop])
    del weights, columns
    score_grads = score_grads.view(-1, projections * n)
    key_grad = x.new_empty(key.shape if key_spans else 0, dtype=key_dtype)
    for start, stop in zip(key_spans[::2], key_spans[1::2], strict=True):
        _product(score_grads[:, start:stop].t(), x, out=key_grad[start:stop])
    return torch.mm(score_grads, key) if need_x else x.new_empty(0), key_grad, value_grad


def _through_weights(
    grads: list[Tensor], scores: Tensor, statistics: Tensor, value: Tensor, kind: WeightKind, *, keep: bool
) -> tuple[Tensor, Tensor]:
    """The weights again and the gradient of the scores, [rows * p, n] each; unless ``keep`` the scores may be lost."""
    from tokenformer.ops import pattention_sm90
    from tokenformer.ops.pattention_rows import weights_backward

    projections, n = len(grads), scores.shape[1]
    if all(pattention_sm90.serves(grad, value, n, kind, backward=True) for grad in grads):
        return pattention_sm90.weights_and_score_grads(grads, value, scores, statistics, kind)
    weight_grads = torch.empty_like(scores)
    by_projection = weight_grads.view(-1, projections, n).unbind(1)
    for grad, tokens, out in zip(grads, value.view(projections, n, -1), by_projection, strict=True):
        torch.mm(grad, tokens.t(), out=out)
    return weights_backward(scores, weight_grads, statistics, kind, keep=keep)


@pattention_forward.register_fake
def _(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    projections: int,
    *rest: Any,
) -> tuple[list[Tensor], Tensor, Tensor]:
    outputs = [x.new_empty(x.shape[0], value.shape[1]) for _ in range(projections)]
    keep, recompute_scores = rest[-2:]
    scores, statistics = _nothing_kept(x)
    rows = x.shape[0] * projections
    if keep and not recompute_scores:
        scores = x.new_empty(rows, key.shape[0] // projections)
    if keep:
        statistics = x.new_empty(rows, 2, dtype=torch.float32)
    return outputs, scores, statistics


@pattention_backward.register_fake
def _(
    grads: list[Tensor],
    x: Tensor,
    scores: Tensor | None,
    statistics: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_x, key_spans, value_spans, key_dtype, value_dtype = rest[-5:]
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        x.new_empty(key.shape if key_spans else 0, dtype=key_dtype),
        x.new_empty(value.shape if value_spans else 0, dtype=value_dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, key, value, keys, values, projections, *kind, _, recompute_scores = inputs
    _, scores, statistics = output
    ctx.mark_non_differentiable(scores, statistics)
    ctx.save_for_backward(x, None if recompute_scores else scores, statistics, key, value)
    ctx.kind = kind
    ctx.n = key.shape[0] // projections
    ctx.sizes = [[group.shape[0] for group in groups] for groups in (keys, values)]
    ctx.dtypes = [groups[0].dtype for groups in (keys, values)]


def _backward(ctx: Any, grads: list[Tensor], *_: Tensor | None) -> tuple[Any, ...]:
    need_x, _, _, *needed = ctx.needs_input_grad[:5]
    x, *others = ctx.saved_tensors
    # projections share the product of their keys' gradients, not that of their values'
    within = (len(grads) * ctx.n, ctx.n)
    spans = [_trained_spans(*both) for both in zip(ctx.sizes, needed, within, strict=True)]
    grad_x, *token_grads = pattention_backward(
        grads, x, *others, *ctx.kind, need_x, *spans, *(_sum_dtype(dtype, x.dtype) for dtype in ctx.dtypes)
    )
    parts = map(gradients_of_groups, token_grads, ctx.sizes, needed, ctx.dtypes)
    return grad_x if need_x else None, None, None, *parts, *(None for _ in range(7))


pattention_forward.register_autograd(_backward, setup_context=_setup_context)


def _nothing_kept(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0), x.new_empty(0, dtype=torch.float32)


def _trained_spans(sizes: list[int], trained: list[bool], n: int) -> list[int]:
    """[start, stop, start, stop, ...] over the tokens of all projections: neighbours that are trained, within ``n``
    tokens each."""
    spans: list[int] = []
    position = 0
    for size, wanted in zip(sizes, trained, strict=True):
        if wanted and spans and spans[-1] == position and position % n:
            spans[-1] += size
        elif wanted:
            spans += [position, position + size]
        position += size
    return spans


def _sum_dtype(token_dtype: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """In which products of ``dtype`` give the gradient of tokens: theirs where that is float32, which sums are in."""
    return token_dtype if token_dtype == torch.float32 else dtype


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _kind(norm_activation: Any, tau: float, gelu_approximate: Any, norm_eps: float) -> WeightKind:
    return WeightKind(norm_activation, tau, gelu_approximate, norm_eps)
