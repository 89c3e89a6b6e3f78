"""The formula of the paper's code, in plain tensor operations, as a side to measure against."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def published_pattention(x: Tensor, key: Tensor, value: Tensor, norm_activation: str) -> Tensor:
    """Without guards; ``gelu`` is that of the authors' JAX edition. x [..., d_in], key [n, d_in], value [n, d_out]."""
    scores = x @ key.t()
    n = scores.shape[-1]
    if norm_activation == "gelu":
        weights = F.gelu(scores)
    elif norm_activation == "softmax":
        exponentials = scores.exp()
        weights = exponentials / exponentials.norm(p=1, dim=-1, keepdim=True) * n
    elif norm_activation == "gelu_l2_norm":
        activated = F.gelu(scores)
        weights = activated / activated.norm(dim=-1, keepdim=True) * math.sqrt(n)
    else:
        weights = F.gelu(scores / scores.norm(dim=-1, keepdim=True) * math.sqrt(n))
    return weights @ value
