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
    """Everywhere "small init" sqrt(2 / (5 d)), but where the output joins the residual stream: there ``published``
    (GPT-NeoX, Pythia) has "Wang init" 2 / (L sqrt(d)), ``fan_in`` 1/sqrt(2 L inputs)."""
    layers, d, m = config.num_hidden_layers, config.hidden_size, config.mlp_size
    small = math.sqrt(2 / (5 * d))
    if config.initializer == "published":
        wang = 2 / (layers * math.sqrt(d))
        return WeightStd(small, small, wang, wang)
    return WeightStd(small, small, 1 / math.sqrt(2 * layers * d), 1 / math.sqrt(2 * layers * m))
