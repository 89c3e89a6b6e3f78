"""How the fresh weights of a TokenFormer are drawn."""

from __future__ import annotations

import math

from tokenformer.layers.pattention import TokenInit
from tokenformer.models.tokenformer.config import TokenFormerConfig

VALUE_GAIN = 0.5
"""Of ``fan_in``: values half as loud as 1/sqrt(n) learn faster (docs/quickstart.md)."""


def embedding_std(config: TokenFormerConfig) -> float:
    """Of embeddings, and of an untied head: 0.02 as ``published``; sqrt(2 / (5 d)) ("small init") with ``fan_in``."""
    return 0.02 if config.initializer == "published" else math.sqrt(2 / (5 * config.hidden_size))


def token_init(config: TokenFormerConfig, role: str) -> TokenInit:
    """Scales of fresh parameter tokens of one role (``qkv``, ``proj`` or ``ffn``).

    ``published`` (the authors' code): keys 0.02, values 2 / (L sqrt(d)), whatever n is. ``fan_in``: keys
    1/sqrt(d), values 1/(2 sqrt(n)), divided by sqrt(2 L) where the output joins the residual stream.
    """
    layers, d = config.num_hidden_layers, config.hidden_size
    if config.initializer == "published":
        return TokenInit(key_std=0.02, value_std=2 / (layers * math.sqrt(d)), scale_values=False)
    depth = math.sqrt(2 * layers) if role in ("proj", "ffn") else 1.0
    return TokenInit(key_std=1 / math.sqrt(d), value_std=VALUE_GAIN / depth, scale_values=True)
