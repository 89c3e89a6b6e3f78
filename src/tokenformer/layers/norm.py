"""Layer norm as the blocks have it."""

from __future__ import annotations

from torch import Tensor, nn

from tokenformer.ops.layer_norm import layer_norm


class PlainLayerNorm(nn.Module):
    """Layer norm over the last axis without parameters: [..., d] -> [..., d], in autocast's dtype where that is on."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.features, self.eps = features, eps

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps:g}"

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.eps)
