"""The plain pre-norm Transformer decoder: the baseline, in the same frame as the TokenFormer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenformer.layers.attention import SelfAttention
from tokenformer.layers.block import Block
from tokenformer.models.decoder import Decoder, draw_normal
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.models.transformer.initialization import weight_std


class MLP(nn.Module):
    """``down(gelu(up(x)))``: [..., d] -> [..., d]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=config.use_bias)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=config.use_bias)
        self.act = nn.GELU(approximate="tanh" if config.hidden_act == "gelu_tanh" else "none")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Transformer(Decoder):
    """The language model; calls as in :class:`~tokenformer.models.base.LanguageModel`.

    Args:
        config: sizes and definition.
        generator: draws the fresh weights; torch's global one by default.
    """

    config: TransformerConfig

    def __init__(self, config: TransformerConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config, [_block(config) for _ in range(config.num_hidden_layers)])
        self._initialize(generator)

    def _initialize(self, generator: torch.Generator | None) -> None:
        std = weight_std(self.config)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif self.role_of(name) in ("embedding", "head"):
                draw_normal(parameter, std.embedding, generator)
            elif name.endswith("proj.weight"):
                draw_normal(parameter, std.attention_output, generator)
            elif name.endswith("down.weight"):
                draw_normal(parameter, std.mlp_output, generator)
            elif self.role_of(name) != "norm":
                draw_normal(parameter, std.inner, generator)


def _block(config: TransformerConfig) -> Block:
    d = config.hidden_size
    query, key, value, proj = (nn.Linear(d, d, bias=config.use_bias) for _ in range(4))

    def norm() -> nn.LayerNorm:
        return nn.LayerNorm(d, eps=config.layer_norm_eps, elementwise_affine=config.layer_norm_affine)

    attention = SelfAttention(query, key, value, proj, config.num_attention_heads)
    return Block(norm(), attention, norm(), MLP(config), config.use_parallel_residual)
