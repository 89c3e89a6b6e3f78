"""Rotary position embedding, half-split as in GPT-NeoX (arXiv 2104.09864; Black et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine for :func:`apply_rotary`.

    Args:
        positions: [b, t] integers.
        rotary_dim: rotated features of a head, even.
        theta: base; feature i turns by ``position * theta^(-2i / rotary_dim)``.

    Returns:
        Two float32 tensors [b, 1, t, rotary_dim], the second half a copy of the first.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
    angles = positions[:, None, :, None].float() * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first features of each head; the rest passes through.

    Args:
        x: [b, h, t, e], queries or keys.
        cos: [b, 1, t, r] with r <= e.
        sin: like ``cos``; neither gets a gradient.

    Returns:
        [b, h, t, e], in the dtype of ``x``.
    """
    turned: Tensor = _Rotary.apply(x, cos, sin)
    return turned


class _Rotary(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: one pass, where that of its parts would be several."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _rotate(x, cos, sin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return apply_rotary(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_dim = cos.shape[-1]
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    rotated = (rotated * cos + turned * sin).to(x.dtype)
    if not rest.shape[-1]:
        return rotated
    # the heads of a position stay side by side in memory, as the projection gave them: attention's output has the
    # layout of its queries, and only this one is the next product's input as it lies
    by_position = (part.transpose(1, 2) for part in (rotated, rest))
    return torch.cat(list(by_position), dim=-1).transpose(1, 2)
