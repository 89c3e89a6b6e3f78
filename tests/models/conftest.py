"""The models that every call is tested on: both architectures, every kind, every option that changes a call."""

from __future__ import annotations

from typing import Any

import pytest

from tokenformer.models.base import LanguageModel
from tokenformer.ops.pattention import NORM_ACTIVATIONS

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: ("tokenformer", {"norm_activation": kind}) for kind in NORM_ACTIVATIONS},
    "groups, tanh, tau": (
        "tokenformer",
        {
            "param_token_groups": {"qkv": (4, 2), "proj": (5,), "ffn": (6, 3, 3)},
            "tau": {"qkv": 4.0, "proj": 5.0, "ffn": 6.5},
            "norm_activation": "l2_norm_gelu",
            "gelu_approximate": "tanh",
            "norm_eps": 1e-5,
        },
    ),
    "untied, half rotary": (
        "tokenformer",
        {"tie_word_embeddings": False, "logit_scale": 0.25, "rotary_pct": 0.5},
    ),
    "no positions": ("tokenformer", {"position_embedding": "none"}),
    "transformer": ("transformer", {}),
    "parallel residual, biases": (
        "transformer",
        {
            "use_parallel_residual": True,
            "use_bias": True,
            "layer_norm_affine": False,
            "hidden_act": "gelu_tanh",
            "rotary_pct": 0.25,
        },
    ),
}


@pytest.fixture(scope="session", params=VARIANTS, ids=str)
def any_model(request: pytest.FixtureRequest, make_tokenformer: Any, make_transformer: Any) -> LanguageModel:
    """One of each, with its parameters moved away from values such as 0 and 1 that hide errors."""
    import torch

    architecture, fields = VARIANTS[request.param]
    model = {"tokenformer": make_tokenformer, "transformer": make_transformer}[architecture](**fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            elif "value_tokens" in name:
                parameter.mul_(2)
        model.embedding.weight.mul_(0.4 / model.embedding.weight.std())  # so that attention is not uniform
    return model
