"""Cross-entropy of a linear head without ever holding the logits of all tokens."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenformer.ops.autocast import autocast_dtype, without_autocast

_CHUNK_ELEMENTS = 16 * 1024 * 1024  # logits held at a time
_GPU_CHUNK_ELEMENTS = 256 * 1024 * 1024  # where products of few rows leave most of the device idle
_GPU_ROW_MULTIPLE = 128  # rows of a product's tile
_TRITON_BLOCK = 4096


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, logit_scale: float = 1.0, ignore_index: int = -100
) -> Tensor:
    """Sum of the cross-entropies (nats) of ``logit_scale * hidden weight^T`` against ``targets``.

    Rows are taken in chunks whose gradient is formed at once, so at most 16M logits exist at a time (256M on a GPU,
    where one kernel makes loss and gradient of them).

    Args:
        hidden: [..., d].
        weight: [v, d].
        targets: [...] int64; positions with ``ignore_index`` count nothing.
        logit_scale: multiplies the logits.
        ignore_index: the target that is skipped.

    Returns:
        Scalar, float32 (float64 for float64 hidden states); differentiable once in ``hidden`` and ``weight``.
    """
    dtype = autocast_dtype(hidden)
    if not torch.is_grad_enabled():  # a Function cannot see that no gradient is wanted
        hidden, weight = hidden.detach(), weight.detach()
    with without_autocast(hidden.device.type):
        flat = hidden.reshape(-1, hidden.shape[-1])
        loss: Tensor = _LinearCrossEntropy.apply(
            flat, weight, targets.reshape(-1), logit_scale, ignore_index, dtype
        )
        return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are formed in the forward, for a gradient of 1. Products are of ``dtype``; the casts are in here,
    so that the gradient of a float32 parameter is not rounded."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        logit_scale: float,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        total = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        with_gradient = need_hidden or need_weight
        rows_loss = _rows_by_triton if _triton_serves(hidden) else _rows_plain
        for rows in _row_chunks(hidden, weight.shape[0]):
            logits = hidden[rows] @ weight.t()
            loss, grad = rows_loss(logits, targets[rows], logit_scale, ignore_index, with_gradient)
            total += loss
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), hidden[rows])
            del logits, grad  # or the next chunk's would join them
        if grad_weight is not None and ctx.dtypes[1] == torch.bfloat16:
            grad_weight = grad_weight.bfloat16()
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # [1], which takes part in promotion: rounding 1 / count to bfloat16 would bend every gradient by up to 0.4 %
        factor = grad_loss.view(1)
        grads = [
            None if g is None else (g * factor).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return grads[0], grads[1], None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b`` in the dtype of ``total``, which may be wider."""
    if total.device.type == "cuda" and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _row_chunks(hidden: Tensor, v: int) -> list[slice]:
    """Of equal size on a GPU, and there of whole tiles."""
    rows = hidden.shape[0]
    size = max(1, _CHUNK_ELEMENTS // v)
    if hidden.device.type == "cuda" and rows > size:
        chunks = -(-rows // max(1, _GPU_CHUNK_ELEMENTS // v))
        size = -(-rows // chunks // _GPU_ROW_MULTIPLE) * _GPU_ROW_MULTIPLE
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _rows_plain(
    logits: Tensor, targets: Tensor, scale: float, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk of logits [rows, v], and its gradient [rows, v] where that is wanted."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_probabilities = F.log_softmax(wide * scale, dim=-1)
    loss = F.nll_loss(log_probabilities, targets, ignore_index=ignore_index, reduction="sum")
    if not with_gradient:
        return loss, logits
    return loss, _logit_grad(log_probabilities, targets, ignore_index).mul_(scale).to(logits.dtype)


def _triton_serves(hidden: Tensor) -> bool:
    return (
        hidden.device.type == "cuda"
        and hidden.dtype != torch.float64
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
    )


def _rows_by_triton(
    logits: Tensor, targets: Tensor, scale: float, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`_rows_plain`; the gradient takes the place of the logits."""
    from tokenformer.ops.cross_entropy_triton import cross_entropy_rows

    rows, v = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    cross_entropy_rows[(rows,)](
        logits,
        targets,
        losses,
        v,
        float(scale),
        ignore_index,
        WITH_GRADIENT=with_gradient,
        BLOCK=_TRITON_BLOCK,
        BLOCKS=-(-v // _TRITON_BLOCK),
        num_warps=8,
    )
    return losses.sum(), logits


def _logit_grad(log_probabilities: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Softmax minus one-hot, zero in ignored rows; [rows, v]."""
    kept = targets != ignore_index
    grad = log_probabilities.exp_()
    grad.scatter_add_(1, torch.where(kept, targets, 0)[:, None], grad.new_full((len(targets), 1), -1.0))
    return grad.mul_(kept[:, None])
