"""The residual block that the decoders share, and their heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenformer.layers.attention import AttentionContext, KeyValueBuffer, SelfAttention


class Block(nn.Module):
    """Pre-norm residual block: attention, then ``ffn``; both of the same input with ``parallel_residual``."""

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: SelfAttention,
        ffn_norm: nn.Module,
        ffn: nn.Module,
        parallel_residual: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.ffn = ffn_norm, ffn
        self.parallel_residual = parallel_residual

    def forward(
        self, x: Tensor, context: AttentionContext, buffer: KeyValueBuffer | None
    ) -> tuple[Tensor, KeyValueBuffer | None]:
        """[b, t, d] -> [b, t, d], and the layer's buffer for the next call."""
        attended, buffer = self.attention(self.attention_norm(x), context, buffer)
        if self.parallel_residual:
            return x + attended + self.ffn(self.ffn_norm(x)), buffer
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), buffer


class Head(nn.Module):
    """Logits [..., v] from hidden states [..., d]: ``logit_scale * hidden weight^T``."""

    def __init__(self, vocab_size: int, hidden_size: int, logit_scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.logit_scale = logit_scale

    def forward(self, hidden: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden, self.weight)
        return logits if self.logit_scale == 1.0 else logits * self.logit_scale


class TiedHead(nn.Module):
    """The same with the weight of an embedding, which stays the embedding's alone."""

    def __init__(self, embedding: nn.Embedding, logit_scale: float) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is not registered a second time
        self.logit_scale = logit_scale

    @property
    def weight(self) -> Tensor:
        """[v, d]."""
        return self._embedding[0].weight

    def forward(self, hidden: Tensor) -> Tensor:
        return Head.forward(self, hidden)  # type: ignore[arg-type]
