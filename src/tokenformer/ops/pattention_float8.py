"""Pattention with its products in float8 (e4m3) on a GPU that has them; what lies between them is in float32 as ever.

Every tensor is quantised as it is (dynamic scaling): inputs, weights and gradients with a power of two for each row,
tokens with one for all. Rows are scaled back in what follows a product anyway. The products of the tokens' gradients,
which sum over rows, take transposed copies with one scale. Gradients of the tokens are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenformer.ops.autocast import autocast_dtype, without_autocast
from tokenformer.ops.pattention import (
    NORM_ACTIVATIONS,
    WHOLE_ROWS,
    RowReductions,
    WeightKind,
    pattention_projections,
)
from tokenformer.ops.pattention_float8_copies import (
    FLOAT8,
    both_transposed,
    product,
    rows_to_float8,
    tokens_to_float8,
    transposed,
)
from tokenformer.ops.token_groups import gradients_of_groups, one_matrix

_MULTIPLE = 16  # of every size of a product
_LONGEST_ROW = 16384
_MOST_EACH = 24  # scores that a thread holds
_KEY, _VALUE, _X, _WEIGHT, _SCORE_GRAD, _GRAD = range(6)
"""Rows of the table of numbers that are of a whole tensor: scales."""


def has_float8(device: torch.device) -> bool:
    """Whether the device multiplies float8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def pattention_float8(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    kind: WeightKind,
    rows: RowReductions = WHOLE_ROWS,
    *,
    recompute_scores: bool = False,
) -> Tensor:
    """As :func:`tokenformer.ops.pattention.pattention`."""
    (out,) = pattention_float8_projections(x, [keys], [values], kind, rows, recompute_scores=recompute_scores)
    return out


def pattention_float8_projections(
    x: Tensor,
    keys: Sequence[Sequence[Tensor]],
    values: Sequence[Sequence[Tensor]],
    kind: WeightKind,
    rows: RowReductions = WHOLE_ROWS,
    *,
    recompute_scores: bool = False,
) -> list[Tensor]:
    """As :func:`tokenformer.ops.pattention.pattention_projections`, which it is where sizes are no multiples of 16,
    where the tokens are a part of the layer's, and in other dtypes than bfloat16."""
    n = sum(group.shape[0] for group in keys[0])
    sizes = (x.numel() // x.shape[-1], x.shape[-1], n, values[0][0].shape[-1])
    serves = autocast_dtype(x) == torch.bfloat16 and rows is WHOLE_ROWS
    if not serves or any(size % _MULTIPLE or size == 0 for size in sizes) or n > _LONGEST_ROW:
        return pattention_projections(x, keys, values, kind, rows, recompute_scores=recompute_scores)
    with without_autocast(x.device.type):
        return _fused(x.to(torch.bfloat16), keys, values, kind, recompute_scores)


def _fused(
    x: Tensor,
    keys: Sequence[Sequence[Tensor]],
    values: Sequence[Sequence[Tensor]],
    kind: WeightKind,
    recompute_scores: bool,
) -> list[Tensor]:
    flat_keys, flat_values = (
        [group for projection in tokens for group in projection] for tokens in (keys, values)
    )
    matrices = (one_matrix(groups, torch.bfloat16).contiguous() for groups in (flat_keys, flat_values))
    outputs, scales, *_ = float8_forward(
        x.reshape(-1, x.shape[-1]), *matrices, flat_keys, flat_values, len(values), *kind, recompute_scores
    )
    return [
        _Scaled.apply(out, scale).reshape(*x.shape[:-1], out.shape[-1])
        for out, scale in zip(outputs, scales.unbind(), strict=True)
    ]


class _Scaled(torch.autograd.Function):
    """Rows [rows, d] times their scales [rows]; the gradient that goes back is that of the result."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return _times(x, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _times(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * scale[:, None]).to(x.dtype)


@torch.library.custom_op("tokenformer::pattention_float8_forward", mutates_args=())
def float8_forward(
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
    recompute_scores: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """p projections of ``x`` [rows, d_in]; ``key`` [p * n, d_in] and ``value`` [p * n, d_out] are the tokens, bfloat16,
    of ``keys`` and ``values`` (p * g groups), which stand for them in autograd alone.

    Returns p outputs [rows, d_out] and the scales of their rows [p, rows]; the scores [rows * p, n] (empty with
    ``recompute_scores``) and their statistics [rows * p, 2]; in float8 the weights [p, rows, n], the input [rows, d_in]
    with its scales [rows], the keys transposed [d_in, p * n] and the values [p * n, d_out]; and the table of numbers.
    """
    from tokenformer.ops.pattention_float8_triton import forward_to_float8

    rows, n = x.shape[0], key.shape[0] // projections
    numbers = torch.empty(8, 4, device=x.device)  # rows of 16 bytes
    key, key_transposed, value, value_transposed = tokens_to_float8(key, value, numbers)
    quantized, input_scales = rows_to_float8([x], numbers[_X])
    scores = product(quantized[0], key, numbers[_KEY]).view(-1, n)
    weights = torch.empty(projections, rows, n, dtype=FLOAT8, device=x.device)
    weight_scales = torch.empty(projections, rows, device=x.device)
    statistics = torch.empty(rows * projections, 2, device=x.device)
    launch, numbers_of_kind, options = _layout(1, n, norm_activation, tau, gelu_approximate, norm_eps)
    forward_to_float8[(-(-rows // launch["ROWS"]), projections)](
        scores,
        input_scales[0],
        weights,
        weight_scales,
        numbers[_WEIGHT],
        statistics,
        rows,
        *numbers_of_kind,
        **options,
        **launch,
    )
    if recompute_scores:
        scores = x.new_empty(0)
    outputs = [
        product(w, v, numbers[_VALUE]) for w, v in zip(weights, value_transposed.split(n, dim=1), strict=True)
    ]
    kept = quantized[0], input_scales[0], key_transposed, value, numbers
    return outputs, weight_scales, scores, statistics, weights, *kept


@torch.library.custom_op("tokenformer::pattention_float8_backward", mutates_args=())
def float8_backward(
    grads: list[Tensor],
    scores: Tensor | None,
    statistics: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    x: Tensor,
    input_scales: Tensor,
    key_transposed: Tensor,
    value: Tensor,
    numbers: Tensor,
    norm_activation: str,
    tau: float,
    gelu_approximate: str,
    norm_eps: float,
    need_x: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From ``grads``, p times [rows, d_out], and what the forward returned (None for scores that were not kept):
    gradients of x [rows, d_in], the scales of its rows [rows], of the keys [p * n, d_in] and the values [p * n, d_out],
    float32; empty where not wanted."""
    from tokenformer.ops.pattention_float8_triton import backward_to_float8

    projections, rows, n = weights.shape
    numbers = numbers.clone()
    quantized, grad_scales = rows_to_float8(grads, numbers[_GRAD])
    weight_grads = torch.empty(projections, rows, n, dtype=torch.bfloat16, device=x.device)
    for grad, tokens, out in zip(quantized, value.split(n), weight_grads, strict=True):
        product(grad, tokens, numbers[_VALUE], out=out)
    value_grad = torch.empty(value.shape if need_value else 0, device=x.device)
    if need_value:
        grads_transposed, weights_transposed = both_transposed(
            (quantized, grad_scales, numbers[_GRAD]), (weights, weight_scales, numbers[_WEIGHT])
        )
        for a, b, out in zip(weights_transposed, grads_transposed, value_grad.split(n), strict=True):
            product(a, b, numbers[_GRAD], numbers[_WEIGHT], out=out)
        del grads_transposed, weights_transposed
    if scores is None:
        scores = product(x, transposed(key_transposed[None])[0], numbers[_KEY])
    score_grads = torch.empty(rows, projections * n, dtype=FLOAT8, device=x.device)
    score_grad_scales = torch.empty(rows, device=x.device)
    launch, numbers_of_kind, options = _layout(
        projections, n, norm_activation, tau, gelu_approximate, norm_eps
    )
    backward_to_float8[(-(-rows // launch["ROWS"]),)](
        scores,
        input_scales,
        weight_grads,
        grad_scales,
        score_grads,
        score_grad_scales,
        numbers[_SCORE_GRAD],
        statistics,
        rows,
        *numbers_of_kind,
        **options,
        **launch,
        PROJECTIONS=projections,
    )
    del weight_grads, scores
    key_grad = torch.empty((projections * n, x.shape[1]) if need_key else 0, device=x.device)
    if need_key:
        a, b = both_transposed(
            (score_grads[None], score_grad_scales[None], numbers[_SCORE_GRAD]),
            (x[None], input_scales[None], numbers[_X]),
        )
        product(a[0], b[0], numbers[_X], numbers[_SCORE_GRAD], out=key_grad)
    nothing = torch.empty(0, dtype=torch.bfloat16, device=x.device)
    grad_x = product(score_grads, key_transposed, numbers[_KEY]) if need_x else nothing
    return grad_x, score_grad_scales, key_grad, value_grad


@float8_forward.register_fake
def _(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    projections: int,
    *rest: Any,
) -> Any:
    rows, d_in, d_out, tokens = x.shape[0], x.shape[1], value.shape[1], key.shape[0]
    n = tokens // projections

    def float8(*size: int) -> Tensor:
        return x.new_empty(size, dtype=FLOAT8)

    def float32(*size: int) -> Tensor:
        return x.new_empty(size, dtype=torch.float32)

    outputs = [x.new_empty(rows, d_out) for _ in range(projections)]
    scores = x.new_empty(0) if rest[-1] else x.new_empty(rows * projections, n)
    statistics = float32(rows * projections, 2)
    kept = float8(rows, d_in), float32(rows), float8(d_in, tokens), float8(tokens, d_out), float32(8, 4)
    return outputs, float32(projections, rows), scores, statistics, float8(projections, rows, n), *kept


@float8_backward.register_fake
def _(
    grads: list[Tensor],
    scores: Tensor | None,
    statistics: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    x: Tensor,
    input_scales: Tensor,
    key_transposed: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes: tuple[tuple[int, ...], ...] = (
        tuple(x.shape),
        tuple(key_transposed.shape[::-1]),
        tuple(value.shape),
    )
    grad_x, grad_key, grad_value = (
        x.new_empty(size if wanted else (0,), dtype=dtype)
        for size, wanted, dtype in zip(
            sizes, rest[-3:], (torch.bfloat16, torch.float32, torch.float32), strict=True
        )
    )
    return grad_x, x.new_empty(x.shape[0], dtype=torch.float32), grad_key, grad_value


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, _, _, keys, values, _, *kind, recompute_scores = inputs
    _, weight_scales, scores, statistics, weights, *kept = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(None if recompute_scores else scores, statistics, weights, weight_scales, *kept)
    ctx.kind = kind
    ctx.sizes = [[group.shape[0] for group in groups] for groups in (keys, values)]
    ctx.dtypes = [groups[0].dtype for groups in (keys, values)]


def _backward(ctx: Any, grads: list[Tensor], *_: Tensor | None) -> tuple[Any, ...]:
    need_x, _, _, *needed = ctx.needs_input_grad[:5]
    wanted = [need_x, *(any(flags) for flags in needed)]
    grad_x, scales, *token_grads = float8_backward(grads, *ctx.saved_tensors, *ctx.kind, *wanted)
    parts = map(gradients_of_groups, token_grads, ctx.sizes, needed, ctx.dtypes)
    return _times(grad_x, scales) if need_x else None, None, None, *parts, *(None for _ in range(6))


float8_forward.register_autograd(_backward, setup_context=_setup_context)


def _layout(
    projections: int, n: int, norm_activation: Any, tau: float, gelu_approximate: str, norm_eps: float
) -> tuple[dict[str, int], tuple[float, ...], dict[str, Any]]:
    """Sizes of a program, which takes the scores of so many projections, arguments and options of a pass over them."""
    from tokenformer.ops.pattention_rows import launch_of

    launch = launch_of(n, 16)
    assert launch is not None
    warps, rows = launch.warps, launch.rows
    while projections > 1 and warps < 16 and 32 * warps * _MOST_EACH < projections * n:
        warps, rows = 2 * warps, max(1, rows // 2)
    sizes = {"ROWS": rows, "PIECE": launch.piece, "PIECES": launch.pieces, "num_warps": warps}
    numbers = (n, tau**0.5, tau, norm_eps)
    options = {
        "KIND": NORM_ACTIVATIONS.index(norm_activation),
        "TANH": gelu_approximate == "tanh",
        "EXACT": False,
        "EVEN": launch.piece * launch.pieces == n,
    }
    return sizes, numbers, options
