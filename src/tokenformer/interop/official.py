"""The authors' checkpoints (github.com/Haiyang-W/TokenFormer, GPT-NeoX key names) to model directories.

A source directory holds ``config.json`` (:class:`OfficialConfig`) and ``pytorch_model.bin``, a flat state
dict. Every key is accounted for: nothing is guessed, skipped or filled in. Axis letters: d hidden, n parameter
tokens, v vocabulary, L layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_json, require_free
from tokenformer.interop.formats import Converted
from tokenformer.language.tokenizers import Tokenizer, load_tokenizer
from tokenformer.models.base import LanguageModel
from tokenformer.models.card import model_card
from tokenformer.models.config import PositiveFloat, PositiveInt
from tokenformer.models.directory import save_model
from tokenformer.models.registry import model_class
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.validation import StrictModel, validate

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float32 holds each of them exactly
_LISTED = 8


class OfficialConfig(StrictModel):
    """Fields of the authors' ``config.json``; ``*_slot_num`` are the numbers of parameter tokens."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    qkv_slot_num: PositiveInt
    proj_slot_num: PositiveInt
    ffn_slot_num: PositiveInt
    seq_length: PositiveInt
    rotary_pct: Annotated[float, Field(ge=0, le=1)]
    norm_activation_type: Literal["softmax", "gelu_l2_norm", "l2_norm_gelu"]
    padded_vocab_size: PositiveInt
    layernorm_epsilon: PositiveFloat
    tied: Literal[True]
    """The key names of an untied output layer are not known."""

    def to_native(self, source: str) -> TokenFormerConfig:
        """The same model in our words: tau = n, exact GELU, no eps in the L2 norms."""
        fields = {
            "vocab_size": self.padded_vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "qkv_param_tokens": self.qkv_slot_num,
            "proj_param_tokens": self.proj_slot_num,
            "ffn_param_tokens": self.ffn_slot_num,
            "norm_activation": self.norm_activation_type,
            "gelu_approximate": "none",
            "position_embedding": "rotary",
            "rotary_pct": self.rotary_pct,
            "rope_theta": 10000.0,
            "max_position_embeddings": self.seq_length,
            "layer_norm_eps": self.layernorm_epsilon,
            "tie_word_embeddings": True,
            "initializer": "published",
        }
        return validate(TokenFormerConfig, fields, source=source)


class NativeTensor(NamedTuple):
    """Where a tensor of the checkpoint goes, and the shape it must have."""

    name: str
    shape: tuple[int, ...]


def tensor_map(config: OfficialConfig) -> dict[str, NativeTensor]:
    """Every key of a checkpoint with its place in ours. Block i is ``sequential.{i+2}``, the norm ``{L+3}``."""
    d = config.hidden_size
    tensors = {
        "sequential.0.word_embeddings.weight": NativeTensor("embedding.weight", (config.padded_vocab_size, d))
    }
    pattentions = {
        "attention.query": ("attention.query", config.qkv_slot_num),
        "attention.key": ("attention.key", config.qkv_slot_num),
        "attention.value": ("attention.value", config.qkv_slot_num),
        "attention.proj": ("attention.proj", config.proj_slot_num),
        "mlp": ("ffn", config.ffn_slot_num),
    }
    for block in range(config.num_layers):
        for theirs, (ours, n) in pattentions.items():
            for kind in ("key", "value"):
                key = f"sequential.{block + 2}.{theirs}.{kind}_param_tokens"
                tensors[key] = NativeTensor(f"blocks.{block}.{ours}.{kind}_tokens.0", (n, d))
    for kind in ("weight", "bias"):
        tensors[f"sequential.{config.num_layers + 3}.norm.{kind}"] = NativeTensor(f"norm.{kind}", (d,))
    return tensors


def official_to_native(source: Path, target: Path) -> Converted:
    """Write the model directory ``target`` from the authors' checkpoint in ``source``.

    ``tokenizer.json`` is copied where ``source`` has one. Weights become float32.

    Raises:
        TokenFormerError: missing, damaged or unexpected content of ``source``, each problem named; ``target``
            holds something.
    """
    require_free(target)
    config_path, weights_path = source / "config.json", source / "pytorch_model.bin"
    values = read_json(config_path, "the configuration of an authors' checkpoint")
    official = validate(OfficialConfig, values, source=str(config_path))
    native = official.to_native(str(config_path))
    tokenizer = _load_tokenizer(source, native.vocab_size)
    weights = _read_weights(weights_path)
    expected = tensor_map(official)
    check_weights(weights, expected, weights_path)

    with torch.device("meta"):  # no weights are drawn only to be replaced
        model: LanguageModel = model_class(native.architecture)(native)
    model.load_state_dict({ours.name: weights[key].float() for key, ours in expected.items()}, assign=True)
    facts = {
        "Origin": {"converted from": "a checkpoint of the authors' code", "source": source.resolve().name}
    }
    save_model(model, target, card=model_card(native, facts), tokenizer=tokenizer)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
    return Converted(target, native, len(expected), ", ".join(dtypes), tokenizer is not None)


def _load_tokenizer(source: Path, vocab_size: int) -> Tokenizer | None:
    if not (source / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > vocab_size:
        raise TokenFormerError(
            f"{source / 'tokenizer.json'}: has {tokenizer.vocab_size} tokens, but padded_vocab_size is {vocab_size}"
        )
    return tokenizer


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise TokenFormerError(f"{path}: no such file; expected the weights of an authors' checkpoint")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TokenFormerError(
            f"{path}: damaged, or not a state dict of plain tensors ({_shorten(reason)})"
        ) from error
    if not isinstance(weights, dict):
        raise TokenFormerError(f"{path}: found a {type(weights).__name__}, expected a flat state dict")
    for key, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise TokenFormerError(f"{path}: {key}: found a {type(tensor).__name__}, expected a tensor")
    return weights


def check_weights(weights: dict[str, Tensor], expected: dict[str, NativeTensor], path: Path) -> None:
    """Compare keys, shapes and dtypes with ``expected``, and look for NaN; ``path`` opens every error line.

    Raises:
        TokenFormerError: what is wrong, each tensor named.
    """
    problems = []
    missing = [key for key in expected if key not in weights]
    if missing:
        problems.append(f"{len(missing)} keys missing: {_list(missing)}")
    unexpected = [str(key) for key in weights if key not in expected]
    if unexpected:
        problems.append(f"{len(unexpected)} keys not expected: {_list(unexpected)}")
    present = {key: weights[key] for key in expected if key in weights}
    problems += [
        f"{key}: found shape {list(tensor.shape)}, expected {list(expected[key].shape)}"
        for key, tensor in present.items()
        if tuple(tensor.shape) != expected[key].shape
    ]
    problems += [
        f"{key}: found {str(tensor.dtype).removeprefix('torch.')}, expected float32, bfloat16 or float16"
        for key, tensor in present.items()
        if tensor.dtype not in _DTYPES
    ]
    problems += [
        f"{key}: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} weights are NaN or infinite"
        for key, tensor in present.items()
        if tensor.dtype in _DTYPES and not torch.isfinite(tensor).all()
    ]
    if problems:
        shown = problems[:_LISTED]
        if len(problems) > _LISTED:
            shown.append(f"... and {len(problems) - _LISTED} more problems")
        raise TokenFormerError("\n".join(f"{path}: {problem}" for problem in shown))


def _list(keys: list[str]) -> str:
    more = f", ... ({len(keys) - _LISTED} more)" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more


def _shorten(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
