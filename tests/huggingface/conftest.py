"""Saved models of both architectures, one of them grown, with random weights loud enough to differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenformer.growth.grow import grow
from tokenformer.language.tokenizers import ByteTokenizer
from tokenformer.models.base import LanguageModel
from tokenformer.models.directory import save_model

KINDS = ("tokenformer", "grown", "transformer")


@pytest.fixture(scope="session")
def models(
    make_tokenformer: Callable[..., LanguageModel], make_transformer: Callable[..., LanguageModel]
) -> dict[str, LanguageModel]:
    fields: dict[str, Any] = {"vocab_size": 384, "rotary_pct": 0.5}
    made = {
        "tokenformer": make_tokenformer(**fields, norm_activation="l2_norm_gelu"),
        "grown": grow(grow(make_tokenformer(**fields), factor=2), factor=2, init="copies"),
        "transformer": make_transformer(**fields, use_bias=True, tie_word_embeddings=False),
    }
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for model in made.values():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.fixture(scope="session")
def directories(
    models: dict[str, LanguageModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(model, root / name, tokenizer=ByteTokenizer()) for name, model in models.items()}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)
