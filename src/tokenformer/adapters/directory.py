"""Adapter directories: ``adapter_config.json``, ``adapter_model.safetensors`` and a card. Never pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tokenformer.adapters.card import adapter_card
from tokenformer.adapters.config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterBase,
    AdapterConfig,
    added_tokens,
    read_adapter_config,
)
from tokenformer.errors import TokenFormerError
from tokenformer.files import new_directory, write_json, write_text
from tokenformer.layers.pattention import Pattention
from tokenformer.models.base import LanguageModel
from tokenformer.models.directory import read_tensors
from tokenformer.models.fingerprint import weights_sha256
from tokenformer.models.paths import resolve_model_directory
from tokenformer.models.registry import load_config
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.validation import validate


def describe_base(directory: Path | str) -> AdapterBase:
    """The model of a directory as the base of an adapter; reads all its weights.

    Raises:
        TokenFormerError: no model directory, or one that can carry no adapter.
    """
    directory = resolve_model_directory(directory)
    values = {
        "name": _name(directory),
        "weights_sha256": weights_sha256(directory),
        "config": load_config(directory).model_dump(),
    }
    return validate(AdapterBase, values, source=str(directory))


def save_adapter(
    model: LanguageModel,
    directory: Path | str,
    *,
    base: AdapterBase | Path | str,
    name: str | None = None,
    training: Mapping[str, Any] | None = None,
    card: str | None = None,
    replace: bool = False,
) -> Path:
    """Write the parameter tokens that ``model`` has beyond its base, and nothing else; they appear when complete.

    Args:
        model: the base grown by init ``exact``, whose new groups alone were trained.
        directory: the output; refused when it holds something, unless ``replace``.
        base: the model directory that was grown, or :func:`describe_base` of it.
        name: of the adapter; by default that of the directory.
        training: counters for ``adapter_config.json``.
        card: the text of ``README.md``; by default one made from the configuration.
        replace: exchange an existing directory.

    Raises:
        TokenFormerError: the directory is taken, ``model`` is not ``base`` and more, or the disk refuses.
    """
    directory = Path(directory)
    if not isinstance(base, AdapterBase):
        base = describe_base(base)
    if not isinstance(model.config, TokenFormerConfig):
        raise TokenFormerError(f"adapter: {type(model).__name__} has no parameter tokens")
    added = added_tokens(base.config, model.config)
    base.check_function(_without(model.config, base.config), "adapter")
    config = AdapterConfig(
        name=name or directory.name, param_tokens=added, base=base, training=dict(training or {})
    )
    with new_directory(directory, replace=replace) as scratch:
        write_json(scratch / CONFIG_FILE, config.model_dump(mode="json"))
        try:
            save_file(_new_tokens(model, base.config), scratch / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            raise TokenFormerError(f"{directory}: the tokens could not be written ({error})") from error
        write_text(scratch / "README.md", card or adapter_card(config))
    return directory


def read_adapter(directory: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The configuration and the tensors by name, on the CPU, checked against each other.

    Raises:
        TokenFormerError: missing or damaged files, tensors that are not those of the configuration, or that are not
            finite.
    """
    config = read_adapter_config(directory)
    path = directory / WEIGHTS_FILE
    tensors = read_tensors([path], dict(config.shapes()), f"{path}: the tokens do not fit {CONFIG_FILE}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TokenFormerError(f"{path}: {name}: holds NaN or infinity, expected finite numbers")
    return config, tensors


def pattention_layers(model: LanguageModel) -> dict[str, tuple[str, Pattention]]:
    """Name -> role and layer of every Pattention layer."""
    return {
        name: (model.role_of(f"{name}.key_tokens.0"), layer)
        for name, layer in model.named_modules()
        if isinstance(layer, Pattention)
    }


def _new_tokens(model: LanguageModel, base: TokenFormerConfig) -> dict[str, Tensor]:
    tokens = {}
    for name, (role, layer) in pattention_layers(model).items():
        first = len(base.groups(role))
        for kind in ("key_tokens", "value_tokens"):
            if new := [group.detach() for group in getattr(layer, kind)[first:]]:
                tokens[f"{name}.{kind}"] = torch.cat(new).cpu().contiguous()
    return tokens


def _without(config: TokenFormerConfig, base: TokenFormerConfig) -> TokenFormerConfig:
    """``config`` with the tokens of ``base``, for the comparison of everything else."""
    sizes = {"qkv_param_tokens", "proj_param_tokens", "ffn_param_tokens", "param_token_groups"}
    return TokenFormerConfig.model_validate(config.model_dump() | base.model_dump(include=sizes))


def _name(directory: Path) -> str:
    """``run/model`` for the export of a run, else the directory's name alone."""
    path = directory.resolve()
    return f"{path.parent.name}/{path.name}" if path.name == "model" else path.name
