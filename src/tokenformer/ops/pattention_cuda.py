"""Pattention on a GPU: matrix products of the vendor's library, one Triton pass between them each way.

Saved for the backward are the input, the tokens, the scores (softmax: the weights) and two numbers a row; the other
kinds compute the weights again in the pass that makes the gradient of the scores. Several projections of one input
share the product that gives their scores, and the groups of a projection are one matrix, so neither costs launches of
its own. The function is :func:`tokenformer.ops.pattention.pattention_reference`; as operators of torch they are opaque
to ``torch.compile``, which fuses what is around them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenformer.ops.pattention import WeightKind


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
    x: Tensor, keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]], kind: WeightKind
) -> list[Tensor]:
    """Several projections of one input, for what :func:`applies` admits; differentiable once.

    Args:
        x: [..., d_in].
        keys: for each projection one [n_g, d_in] for each group g; n, the sum over the groups, is the same in all.
        values: for each projection one [n_g, d_out] for each group g.
        kind: the weight function of all projections.

    Returns:
        [..., d_out] for each projection.
    """
    all_keys, all_values = _concatenated(keys), _concatenated(values)
    d_out = all_values.shape[1]
    outputs, _, _ = pattention_forward(
        x.reshape(-1, x.shape[-1]),
        all_keys,
        all_values.reshape(len(values), -1, d_out),
        *kind,
        _trained_spans(keys),
        _trained_spans(values),
        torch.is_grad_enabled() and any(t.requires_grad for t in (x, all_keys, all_values)),
    )
    return [out.reshape(*x.shape[:-1], d_out) for out in outputs]


def _concatenated(tokens: Sequence[Sequence[Tensor]]) -> Tensor:
    parts = [group for projection in tokens for group in projection]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _trained_spans(tokens: Sequence[Sequence[Tensor]]) -> list[int]:
    """[start, stop, start, stop, ...] over the tokens of all projections: neighbours within one projection that are
    trained."""
    spans: list[int] = []
    position = 0
    for projection in tokens:
        extends = False  # whether the last span ends where the next group of this projection begins
        for group in projection:
            stop = position + group.shape[0]
            if group.requires_grad:
                spans = [*spans[:-1], stop] if extends else [*spans, position, stop]
            extends, position = group.requires_grad, stop
    return spans or [0, 0]  # torch would take an empty list for one of tensors


@torch.library.custom_op("tokenformer::pattention_forward", mutates_args=())
def pattention_forward(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    norm_activation: str,
    tau: float,
    gelu_approximate: str,
    norm_eps: float,
    key_spans: list[int],
    value_spans: list[int],
    keep: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """p projections of ``x`` [rows, d_in]; ``key`` [p * n, d_in], ``value`` [p, n, d_out].

    Returns p outputs [rows, d_out], and for the backward what is kept of the scores [rows * p, n] and their
    statistics [rows * p, 2]; both empty unless ``keep``. The spans name the tokens whose gradient will be wanted.
    """
    from tokenformer.ops.pattention_rows import weights_forward

    projections, n, _ = value.shape
    scores = torch.mm(x, key.t()).view(-1, n)
    kind = _kind(norm_activation, tau, gelu_approximate, norm_eps)
    weights, kept, statistics = weights_forward(scores, kind, keep=keep)
    by_projection = weights.view(-1, projections, n).unbind(1)
    outputs = [torch.mm(*pair) for pair in zip(by_projection, value, strict=True)]
    return outputs, kept if keep else x.new_empty(0, n), statistics if keep else statistics.new_empty(0, 2)


@torch.library.custom_op("tokenformer::pattention_backward", mutates_args=())
def pattention_backward(
    grads: list[Tensor],
    x: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    statistics: Tensor,
    norm_activation: str,
    tau: float,
    gelu_approximate: str,
    norm_eps: float,
    key_spans: list[int],
    value_spans: list[int],
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, key and value from ``grads``, p times [rows, d_out]; zero outside the spans, empty for
    an unwanted x."""
    from tokenformer.ops.pattention_rows import weights_backward

    projections, n, _ = value.shape
    score_grads = torch.empty_like(kept)
    for grad, tokens, out in zip(grads, value, score_grads.view(-1, projections, n).unbind(1), strict=True):
        torch.mm(grad, tokens.t(), out=out)
    kind = _kind(norm_activation, tau, gelu_approximate, norm_eps)
    weights, score_grads = weights_backward(kept, score_grads, statistics, kind)
    value_grad = _value_gradient(weights.view(-1, projections, n), grads, value_spans)
    del weights
    score_grads = score_grads.view(-1, projections * n)
    key_grad = _key_gradient(score_grads, x, key_spans)
    return torch.mm(score_grads, key) if need_x else x.new_empty(0), key_grad, value_grad


@pattention_forward.register_fake
def _(x: Tensor, key: Tensor, value: Tensor, *kind_and_spans: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    (projections, n, d_out), rows = value.shape, x.shape[0]
    kept = rows * projections if kind_and_spans[-1] else 0
    statistics = x.new_empty(kept, 2, dtype=torch.float32)
    return [x.new_empty(rows, d_out) for _ in range(projections)], x.new_empty(kept, n), statistics


@pattention_backward.register_fake
def _(
    grads: list[Tensor], x: Tensor, key: Tensor, value: Tensor, *rest_and_need: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x) if rest_and_need[-1] else x.new_empty(0)
    return grad_x, key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor, Tensor]) -> None:
    x, key, value, *options, _ = inputs
    _, kept, statistics = output
    ctx.mark_non_differentiable(kept, statistics)
    ctx.save_for_backward(x, key, value, kept, statistics)
    ctx.options = options


def _backward(ctx: Any, grads: list[Tensor], *_: Tensor | None) -> tuple[Tensor | None, ...]:
    need_x, need_key, need_value, *others = ctx.needs_input_grad
    *kind, key_spans, value_spans = ctx.options
    grad_x, grad_key, grad_value = pattention_backward(
        grads,
        *ctx.saved_tensors,
        *kind,
        key_spans if need_key else [],
        value_spans if need_value else [],
        need_x,
    )
    return (
        grad_x if need_x else None,
        grad_key if need_key else None,
        grad_value if need_value else None,
        *(None for _ in others),
    )


pattention_forward.register_autograd(_backward, setup_context=_setup_context)


def _kind(norm_activation: Any, tau: float, gelu_approximate: Any, norm_eps: float) -> WeightKind:
    return WeightKind(norm_activation, tau, gelu_approximate, norm_eps)


def _key_gradient(score_grads: Tensor, x: Tensor, spans: list[int]) -> Tensor:
    """[rows, p * n] and [rows, d_in] to [p * n, d_in]."""
    tokens = score_grads.shape[1]
    if _cover(spans, tokens):
        return torch.mm(score_grads.t(), x)
    total = x.new_zeros(tokens, x.shape[1])
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        torch.mm(score_grads[:, start:stop].t(), x, out=total[start:stop])
    return total


def _value_gradient(weights: Tensor, grads: list[Tensor], spans: list[int]) -> Tensor:
    """[rows, p, n] and p times [rows, d_out] to [p, n, d_out]."""
    _, projections, n = weights.shape
    size = (projections, n, grads[0].shape[1])
    total = grads[0].new_empty(size) if _cover(spans, projections * n) else grads[0].new_zeros(size)
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        p, first = divmod(start, n)
        columns = slice(first, first + stop - start)
        torch.mm(weights[:, p, columns].t(), grads[p], out=total[p, columns])
    return total


def _cover(spans: list[int], tokens: int) -> bool:
    return sum(spans[1::2]) - sum(spans[::2]) == tokens
