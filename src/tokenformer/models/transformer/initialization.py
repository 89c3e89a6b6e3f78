"""How the fresh weights of a Transformer are drawn."""

from __future__ import annotations

import math
from typing import NamedTuple

from tokenformer.models.transformer.config import TransformerConfig


class WeightStd(NamedTuple):
    """Standard deviations: embeddings (and an untied head), matrices that read the residual stream, the
    attention output, and the MLP output."""

    embedding: float
    inner: float
    attention_output: float
    mlp_output: float


def weight_std(config: TransformerConfig) -> WeightStd:
    """``published`` (GPT-NeoX, Pythia): "small init" sqrt(2 / (5 d)) and, where the output joins the residual
    stream, "Wang init" 2 / (L sqrt(d)). ``fan_in``: 1/sqrt(inputs), there divided by sqrt(2 L)."""
    layers, d, m = config.num_hidden_layers, config.hidden_size, config.mlp_size
    if config.initializer == "published":
        small, wang = math.sqrt(2 / (5 * d)), 2 / (layers * math.sqrt(d))
        return WeightStd(small, small, wang, wang)
    depth = math.sqrt(2 * layers)
    return WeightStd(0.02, 1 / math.sqrt(d), 1 / (depth * math.sqrt(d)), 1 / (depth * math.sqrt(m)))
