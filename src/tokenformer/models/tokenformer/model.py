"""TokenFormer: a pre-norm decoder whose every projection is Pattention (arXiv 2410.23168, section 3.2)."""

from __future__ import annotations

import torch

from tokenformer.layers.attention import SelfAttention
from tokenformer.layers.block import Block, Head
from tokenformer.layers.norm import PlainLayerNorm
from tokenformer.layers.pattention import Pattention
from tokenformer.models.decoder import Decoder, draw_normal
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.models.tokenformer.initialization import embedding_std, token_init


class TokenFormer(Decoder):
    """The language model; calls as in :class:`~tokenformer.models.base.LanguageModel`.

    ``x += proj(attention(LN(x)))``, ``x += ffn(LN(x))``, where query, key, value, proj and ffn are each one
    Pattention over the layer's own parameter tokens. The norms inside the blocks have no parameters, the final
    one has weight and bias; there are no biases elsewhere.

    Args:
        config: sizes and definition.
        generator: draws the fresh weights; torch's global one by default.
    """

    config: TokenFormerConfig

    def __init__(self, config: TokenFormerConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config, [_block(config, generator) for _ in range(config.num_hidden_layers)])
        draw_normal(self.embedding.weight, embedding_std(config), generator)
        if isinstance(self.head, Head):
            draw_normal(self.head.weight, embedding_std(config), generator)


def _block(config: TokenFormerConfig, generator: torch.Generator | None) -> Block:
    d = config.hidden_size

    def projection(role: str) -> Pattention:
        return Pattention(
            d,
            d,
            config.groups(role),
            norm_activation=config.norm_activation,
            tau=getattr(config.tau, role),
            gelu_approximate=config.gelu_approximate,
            norm_eps=config.norm_eps,
            init=token_init(config, role),
            generator=generator,
        )

    def norm() -> PlainLayerNorm:
        return PlainLayerNorm(d, eps=config.layer_norm_eps)

    attention = SelfAttention(
        query=projection("qkv"),
        key=projection("qkv"),
        value=projection("qkv"),
        proj=projection("proj"),
        num_heads=config.num_attention_heads,
    )
    return Block(norm(), attention, norm(), projection("ffn"))
