"""Rotary position embedding, half-split as in GPT-NeoX (arXiv 2104.09864; Black et al. 2022)."""

from __future__ import annotations

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
        sin: like ``cos``.

    Returns:
        [b, h, t, e], in the dtype of ``x``.
    """
    rotary_dim = cos.shape[-1]
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    rotated = (rotated * cos + turned * sin).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
