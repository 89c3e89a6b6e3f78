"""Sequence models that grow.

The names below are imported when first used, so that ``import tokenformer`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenformer.adapters.apply import load_adapter, merge_adapters, without_adapters
    from tokenformer.adapters.directory import save_adapter
    from tokenformer.errors import TokenFormerError
    from tokenformer.generation.engine import generate
    from tokenformer.growth.grow import grow
    from tokenformer.language.tokenizers import load_tokenizer
    from tokenformer.layers.pattention import Pattention
    from tokenformer.models.directory import load_model, save_model
    from tokenformer.models.tokenformer.config import TokenFormerConfig
    from tokenformer.models.tokenformer.model import TokenFormer
    from tokenformer.models.transformer.config import TransformerConfig
    from tokenformer.models.transformer.model import Transformer

_HOMES = {
    "Pattention": "tokenformer.layers.pattention",
    "TokenFormer": "tokenformer.models.tokenformer.model",
    "TokenFormerConfig": "tokenformer.models.tokenformer.config",
    "TokenFormerError": "tokenformer.errors",
    "Transformer": "tokenformer.models.transformer.model",
    "TransformerConfig": "tokenformer.models.transformer.config",
    "generate": "tokenformer.generation.engine",
    "grow": "tokenformer.growth.grow",
    "load_adapter": "tokenformer.adapters.apply",
    "load_model": "tokenformer.models.directory",
    "load_tokenizer": "tokenformer.language.tokenizers",
    "merge_adapters": "tokenformer.adapters.apply",
    "save_adapter": "tokenformer.adapters.directory",
    "save_model": "tokenformer.models.directory",
    "without_adapters": "tokenformer.adapters.apply",
}

__all__ = [
    "Pattention",
    "TokenFormer",
    "TokenFormerConfig",
    "TokenFormerError",
    "Transformer",
    "TransformerConfig",
    "generate",
    "grow",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "merge_adapters",
    "save_adapter",
    "save_model",
    "without_adapters",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenformer' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
