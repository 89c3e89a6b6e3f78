"""Cross-entropy of a linear head without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenformer.ops.autocast import autocast_dtype, without_autocast

_CHUNK_ELEMENTS = 16 * 1024 * 1024  # logits held at a time


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, logit_scale: float = 1.0, ignore_index: int = -100
) -> Tensor:
    """Sum of the cross-entropies (nats) of ``logit_scale * hidden weight^T`` against ``targets``.

    Rows are taken in chunks whose gradient is formed at once, so at most 16M logits exist at a time.

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
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():  # a Function cannot see that no gradient is wanted
        hidden, weight = hidden.detach(), weight.detach()
    with without_autocast(hidden.device.type):
        flat = hidden.reshape(-1, hidden.shape[-1])
        loss: Tensor = _LinearCrossEntropy.apply(flat, weight, targets.reshape(-1), logit_scale, ignore_index)
        return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, logit_scale: float, ignore_index: int
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        chunk = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ weight.t()).to(wide) * logit_scale
            log_probabilities = F.log_softmax(logits, dim=-1)
            total += F.nll_loss(log_probabilities, targets[rows], ignore_index=ignore_index, reduction="sum")
            if grad_hidden is None and grad_weight is None:
                continue
            grad = (
                _logit_grad(log_probabilities, targets[rows], ignore_index).mul_(logit_scale).to(hidden.dtype)
            )
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
        if (
            grad_weight is not None and weight.dtype != torch.float16
        ):  # whose range a sum over tokens can leave
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # scaled in the dtype of the loss: rounding 1 / count to bfloat16 would bend every gradient by up to 0.4 %
        grads = [
            None if g is None else (g.to(grad_loss.dtype) * grad_loss).to(g.dtype) for g in ctx.saved_tensors
        ]
        return grads[0], grads[1], None, None, None


def _logit_grad(log_probabilities: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Softmax minus one-hot, zero in ignored rows; [rows, v]."""
    kept = targets != ignore_index
    grad = log_probabilities.exp_()
    grad.scatter_add_(1, torch.where(kept, targets, 0)[:, None], grad.new_full((len(targets), 1), -1.0))
    return grad.mul_(kept[:, None])
