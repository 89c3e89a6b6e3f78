"""Whether kernels can be used here, and for which models."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import nn

from tokenformer.layers.attention import SelfAttention
from tokenformer.layers.block import Block
from tokenformer.layers.int8 import Int8Linear, Int8Pattention
from tokenformer.layers.norm import PlainLayerNorm
from tokenformer.layers.pattention import Pattention, is_plain
from tokenformer.models.base import LanguageModel
from tokenformer.models.decoder import Decoder
from tokenformer.models.tokenformer.config import ROLES, TokenFormerConfig
from tokenformer.models.transformer.model import MLP
from tokenformer.ops.pattention import pattention

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_COLUMNS = 16384


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def serve_model(model: LanguageModel) -> bool:
    """Whether the kernels of one token compute what this model does."""
    return (
        isinstance(model, Decoder)
        and has_triton()
        and all(parameter.dtype in _DTYPES for parameter in model.parameters())
        and _widest(model) <= _MOST_COLUMNS
        and all(_serve_block(block) for block in model.blocks)
    )


def _widest(model: LanguageModel) -> int:
    """Inputs of the matrix that has the most, one row of which a program must hold."""
    config = model.config
    if isinstance(config, TokenFormerConfig):
        return max(config.hidden_size, *(config.param_tokens(role) for role in ROLES))
    return max(config.hidden_size, getattr(config, "mlp_size", 0))


def _serve_block(block: nn.Module) -> bool:
    if type(block) is not Block or block.parallel_residual or type(block.attention) is not SelfAttention:
        return False
    if not {type(block.attention_norm), type(block.ffn_norm)} <= {nn.LayerNorm, PlainLayerNorm}:
        return False
    attention = block.attention
    qkv = (attention.query, attention.key, attention.value)
    projections = (*qkv, attention.proj)
    if all(_serve_layer(layer) for layer in (*projections, block.ffn)):
        return (
            len({(type(layer), layer.kind) for layer in qkv}) == 1 and len(set(map(_token_count, qkv))) == 1
        )
    linear = (nn.Linear, Int8Linear)
    if type(block.ffn) is not MLP or type(block.ffn.up) not in linear or type(block.ffn.down) not in linear:
        return False
    return all(type(layer) in linear for layer in projections) and len(set(map(type, qkv))) == 1


def _serve_layer(layer: nn.Module) -> bool:
    return type(layer) is Int8Pattention or (
        type(layer) is Pattention and is_plain(layer) and layer.op is pattention
    )


def _token_count(layer: nn.Module) -> int:
    if isinstance(layer, Int8Pattention):
        return layer.keys.weight.shape[0]
    assert isinstance(layer, Pattention)
    return layer.num_param_tokens
