"""Model directories to the authors' checkpoints: ``config.json`` and ``pytorch_model.bin`` as ``official`` reads them.

In the authors' code tau is the number of parameter tokens n, so a model whose tau is another number (one that has
grown, say) is rewritten such that it computes the same function with tau = n:

- ``gelu_l2_norm``: values times sqrt(tau / n); ``softmax``: values times tau / n.
- ``l2_norm_gelu``: m tokens are appended with zero values and keys sqrt((n + m) / tau - 1) R, where R^T R = K^T K.
  Since |x R^T| = |x K^T|, they make the norm of the scores sqrt((n + m) / tau) times as long, which cancels the new
  tau. m is d, or more where the root would not be real.
- ``gelu`` has no counterpart there and is refused.

Groups are merged in their order; where tau = n every weight stays bit for bit. Axis letters: d hidden, m appended
tokens, n parameter tokens.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.files import new_directory, require_free, write_json
from tokenformer.interop.formats import Converted
from tokenformer.interop.official import tensor_map
from tokenformer.interop.official_config import ROPE_THETA, OfficialConfig
from tokenformer.interop.weights import check_weights
from tokenformer.models.config import DecoderConfig
from tokenformer.models.directory import load_model
from tokenformer.models.paths import resolve_model_directory
from tokenformer.models.registry import load_config
from tokenformer.models.tokenformer.config import ROLES, TokenFormerConfig
from tokenformer.validation import validate


class _Tokens(NamedTuple):
    """Keys [n, d] and values [n, d] of one Pattention."""

    keys: Tensor
    values: Tensor


def native_to_official(source: Path, target: Path) -> Converted:
    """Write the authors' checkpoint ``target`` from the model directory (or run directory) ``source``.

    Weights are written in float32. ``tokenizer.json`` is copied where ``source`` has one. The configuration in the
    result is that of the written model, which can have more parameter tokens than ``source``.

    Raises:
        TokenFormerError: the model cannot be represented, with every reason; NaN or infinite weights; damaged
            content of ``source``; ``target`` holds something.
    """
    require_free(target)
    directory = resolve_model_directory(source)
    place = str(directory / "config.json")
    config = _representable(load_config(directory), place)
    official = _official_config(config, place)
    model = load_model(directory, dtype=torch.float32)
    weights = _official_weights(model.state_dict(), config, official)
    check_weights(weights, tensor_map(official), directory)

    tokenizer = directory / "tokenizer.json"
    with new_directory(target) as scratch:
        write_json(scratch / "config.json", official.model_dump())
        torch.save(weights, scratch / "pytorch_model.bin")
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, scratch / "tokenizer.json")
    written = official.to_native(place)
    return Converted(
        target, written, len(weights), "float32", tokenizer.is_file(), tuple(_changes(config, written))
    )


def _representable(config: DecoderConfig, place: str) -> TokenFormerConfig:
    """``config`` itself, where the authors' code can compute what it says."""
    if not isinstance(config, TokenFormerConfig):
        raise TokenFormerError(
            f"{place}: model_type is '{config.architecture}'; the authors' format holds TokenFormers only"
        )
    problems = []
    if config.norm_activation == "gelu":
        problems.append("norm_activation 'gelu': the authors' code has no weight function without a norm")
    elif config.norm_activation != "softmax" and config.gelu_approximate != "none":
        problems.append(f"gelu_approximate '{config.gelu_approximate}': the authors' GELU is the exact one")
    if "l2_norm" in config.norm_activation and config.norm_eps:
        problems.append(f"norm_eps {config.norm_eps:g}: the authors' L2 norms have no eps")
    if not config.tie_word_embeddings:
        problems.append("tie_word_embeddings false: the names of an untied output layer are not known")
    if config.position_embedding != "rotary":
        problems.append(f"position_embedding '{config.position_embedding}': expected rotary")
    elif config.rope_theta != ROPE_THETA:
        problems.append(f"rope_theta {config.rope_theta:g}: the authors' is 10000")
    if problems:
        raise TokenFormerError(
            "\n".join(f"{place}: cannot be written for the authors' code: {problem}" for problem in problems)
        )
    return config


def _official_config(config: TokenFormerConfig, place: str) -> OfficialConfig:
    tokens = {
        f"{role}_slot_num": config.param_tokens(role) + _appended_tokens(config, role) for role in ROLES
    }
    fields = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        **tokens,
        "seq_length": config.max_position_embeddings,
        "rotary_pct": config.rotary_pct,
        "norm_activation_type": config.norm_activation,
        "padded_vocab_size": config.vocab_size,
        "layernorm_epsilon": config.layer_norm_eps,
        "tied": True,
    }
    return validate(OfficialConfig, fields, source=place)


def _tau(config: TokenFormerConfig, role: str) -> float:
    return float(getattr(config.tau, role))


def _appended_tokens(config: TokenFormerConfig, role: str) -> int:
    """m: tokens to append to each Pattention of ``role``."""
    n, tau = config.param_tokens(role), _tau(config, role)
    if config.norm_activation != "l2_norm_gelu" or tau == n:
        return 0
    return max(config.hidden_size, math.ceil(tau - n))


def _official_weights(
    state: dict[str, Tensor], config: TokenFormerConfig, official: OfficialConfig
) -> dict[str, Tensor]:
    """The authors' state dict. ``logit_scale`` moves into the final norm, which the logits are linear in."""
    rewritten = dict(state)
    if config.logit_scale != 1.0:
        rewritten |= {
            f"norm.{kind}": state[f"norm.{kind}"] * config.logit_scale for kind in ("weight", "bias")
        }
    roles = {"query": "qkv", "key": "qkv", "value": "qkv", "proj": "proj"}
    for block in range(config.num_hidden_layers):
        layers = {f"blocks.{block}.attention.{name}": role for name, role in roles.items()}
        for layer, role in {**layers, f"blocks.{block}.ffn": "ffn"}.items():
            tokens = _with_tau_n(_merged(state, layer, len(config.groups(role))), config, role)
            rewritten[f"{layer}.key_tokens.0"] = tokens.keys
            rewritten[f"{layer}.value_tokens.0"] = tokens.values
    return {key: rewritten[ours.name].contiguous() for key, ours in tensor_map(official).items()}


def _merged(state: dict[str, Tensor], layer: str, groups: int) -> _Tokens:
    keys, values = (
        torch.cat([state[f"{layer}.{kind}.{group}"] for group in range(groups)])
        for kind in ("key_tokens", "value_tokens")
    )
    return _Tokens(keys, values)


def _with_tau_n(tokens: _Tokens, config: TokenFormerConfig, role: str) -> _Tokens:
    """Tokens that compute the same with tau = their number."""
    n, tau = config.param_tokens(role), _tau(config, role)
    if tau == n:
        return tokens
    if config.norm_activation == "softmax":
        return tokens._replace(values=_scaled(tokens.values, tau / n))
    if config.norm_activation == "gelu_l2_norm":
        return tokens._replace(values=_scaled(tokens.values, math.sqrt(tau / n)))
    m = _appended_tokens(config, role)
    keys = tokens.keys.new_zeros(m, config.hidden_size)
    root = _square_root_of_gram(tokens.keys)
    keys[: len(root)] = root * math.sqrt((n + m) / tau - 1)
    return _Tokens(torch.cat([tokens.keys, keys]), torch.cat([tokens.values, torch.zeros_like(keys)]))


def _scaled(values: Tensor, factor: float) -> Tensor:
    return (values.double() * factor).to(values.dtype)


def _square_root_of_gram(keys: Tensor) -> Tensor:
    """R [min(n, d), d], float64, with R^T R = K^T K for ``keys`` K [n, d]; K = Q R needs no squares of K."""
    return cast(Tensor, torch.linalg.qr(keys.double(), mode="r").R)


def _changes(config: TokenFormerConfig, written: TokenFormerConfig) -> list[str]:
    """What was rewritten, in words."""
    changes = []
    if config.logit_scale != 1.0:
        changes.append(f"logit_scale {config.logit_scale:g} moved into the final norm")
    for role in ROLES:
        n, tau, total = config.param_tokens(role), _tau(config, role), written.param_tokens(role)
        if total != n:
            changes.append(
                f"{role}: tau {tau:g} is not n = {n}, so {total - n} parameter tokens were appended to each layer"
            )
        elif tau != n:
            changes.append(
                f"{role}: tau {tau:g} is not n = {n}, so the values were multiplied to make up for it"
            )
    return changes
