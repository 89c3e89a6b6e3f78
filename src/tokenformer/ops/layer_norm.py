"""Layer norm without parameters that keeps its result for the backward, not its input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenformer.ops.autocast import autocast_dtype


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(variance + eps)`` over the last axis.

    In autocast the result is in autocast's dtype, and the backward needs only it: what is kept is what the product
    after it keeps anyway. The gradient has that dtype's rounding of the result in one of its terms.

    Args:
        x: [..., d].
        eps: added to the variance.

    Returns:
        [..., d], in the dtype of ``x``, or in autocast's where that is on; computed in float32.
    """
    dtype = autocast_dtype(x)
    if dtype == x.dtype:
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    normal: Tensor = _Normalize.apply(x, eps, dtype)[0]
    return normal


class _Normalize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = x.float()
        variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        rstd = torch.rsqrt(variance + eps)
        return ((wide - mean) * rstd).to(dtype), rstd

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, float, torch.dtype], output: tuple[Tensor, Tensor]
    ) -> None:
        ctx.save_for_backward(*output)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        normal, rstd = ctx.saved_tensors
        wide, grad = normal.float(), grad.float()
        along = (grad * wide).mean(-1, keepdim=True)
        grad_x = (grad - grad.mean(-1, keepdim=True) - wide * along) * rstd
        return grad_x.to(ctx.dtype), None, None
