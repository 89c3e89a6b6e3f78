"""Adapters on top of a model in memory: loaded, switched off, taken off, merged in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from tokenformer.adapters.config import (
    AdapterBase,
    AdapterConfig,
    read_adapter_config,
    resolve_adapter_directory,
)
from tokenformer.adapters.directory import pattention_layers, read_adapter
from tokenformer.errors import TokenFormerError
from tokenformer.models.base import LanguageModel
from tokenformer.models.directory import load_model
from tokenformer.models.fingerprint import model_sha256, weights_sha256
from tokenformer.models.hub import local_or_hub
from tokenformer.models.registry import load_config
from tokenformer.models.tokenformer.config import ROLES, TokenFormerConfig


class LoadedAdapter(NamedTuple):
    """An entry of ``model.adapters``: the adapter, and the model's configuration before and after it came."""

    config: AdapterConfig
    before: TokenFormerConfig
    after: TokenFormerConfig


def load_adapter(
    model: LanguageModel, directory: Path | str, *, base: Path | str | None = None
) -> AdapterConfig:
    """Append the parameter tokens of an adapter to ``model``, in place; on top of others, if there are any.

    The tokens take the dtype and device of the layers they join.

    Args:
        model: the adapter's base, with or without other adapters.
        directory: of the adapter, or the run directory that trained it.
        base: the model directory that ``model`` was loaded from; its files are then compared with the adapter's hash,
            otherwise the weights in memory, which must have the dtype of the files for that.

    Returns:
        The adapter's configuration.

    Raises:
        TokenFormerError: no adapter there, a damaged one, or one of another model.
    """
    directory = resolve_adapter_directory(directory)
    adapter = read_adapter_config(directory)
    with without_adapters(model):
        adapter.base.check_function(model.config, str(directory))
        if base is not None:
            adapter.base.check_hash(weights_sha256(base), str(directory))
        else:
            hint = " (of a model in another dtype than its files, name the directory as base)"
            adapter.base.check_hash(model_sha256(model), str(directory), hint)
    _append(model, directory)
    return adapter


def load_with_adapters(
    base: Path | str,
    adapters: Sequence[Path | str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """:func:`~tokenformer.models.directory.load_model` of ``base``, with adapters on top in the order given.

    Raises:
        TokenFormerError: as there; or an adapter that is missing, damaged or of another model.
    """
    directories = [resolve_adapter_directory(path) for path in adapters]
    if directories:
        base = local_or_hub(base)
        config, found = load_config(base), weights_sha256(base)
        for directory in directories:
            expected = read_adapter_config(directory).base
            expected.check_function(config, str(directory))
            expected.check_hash(found, str(directory))
    model = load_model(base, device=device, dtype=dtype)
    for directory in directories:
        _append(model, directory)
    return model


@contextmanager
def without_adapters(model: LanguageModel) -> Iterator[LanguageModel]:
    """Switch all adapters off: inside the block ``model`` is its base, bit for bit, with the base's configuration.

    Raises:
        TokenFormerError: the groups of parameter tokens have changed since the adapters were loaded.
    """
    loaded, config = model.adapters, model.config
    kept = {layer: (layer.key_tokens, layer.value_tokens) for _, layer in pattention_layers(model).values()}
    remove_adapters(model)
    try:
        yield model
    finally:
        model.adapters, model.config = loaded, config
        for layer, (keys, values) in kept.items():
            layer.key_tokens, layer.value_tokens = keys, values


def remove_adapters(model: LanguageModel) -> None:
    """Take all adapters off, in place: the base is left, bit for bit.

    Raises:
        TokenFormerError: the groups of parameter tokens have changed since the adapters were loaded.
    """
    if not model.adapters:
        return
    _require_unchanged(model)
    base: TokenFormerConfig = model.adapters[0].before
    for role, layer in pattention_layers(model).values():
        groups = len(base.groups(role))
        layer.key_tokens = nn.ParameterList(layer.key_tokens[:groups])
        layer.value_tokens = nn.ParameterList(layer.value_tokens[:groups])
    model.adapters, model.config = (), base


def merge_adapters(model: LanguageModel, *, consolidate: bool = True) -> None:
    """Make the adapters part of the model, in place; there is no way back.

    Args:
        model: with adapters or, where groups are to be consolidated, without.
        consolidate: merge all groups of parameter tokens of a layer into one, those of earlier growth too: the function
            stays the same up to rounding. Otherwise the groups stay, and the function bit for bit.

    Raises:
        TokenFormerError: the model has no parameter tokens, their groups have changed since the adapters were loaded,
            or some of them are frozen and others not.
    """
    config = model.config
    if not isinstance(config, TokenFormerConfig):
        raise TokenFormerError(f"merge_adapters: {type(model).__name__} has no parameter tokens")
    _require_unchanged(model)
    if consolidate:
        for _, layer in pattention_layers(model).values():
            layer.consolidate()
        whole = {role: (config.param_tokens(role),) for role in ROLES}
        model.config = TokenFormerConfig.model_validate(config.model_dump() | {"param_token_groups": whole})
    model.adapters = ()


def adapter_parameters(model: LanguageModel, base: AdapterBase) -> set[str]:
    """Names of the parameters that ``model`` has beyond ``base``: those that an adapter's training moves."""
    return {
        f"{name}.{kind}.{group}"
        for name, (role, layer) in pattention_layers(model).items()
        for kind in ("key_tokens", "value_tokens")
        for group in range(len(base.config.groups(role)), len(layer.groups))
    }


def _append(model: LanguageModel, directory: Path) -> None:
    adapter, tensors = read_adapter(directory)
    before = model.config
    assert isinstance(before, TokenFormerConfig)
    for name, (_, layer) in pattention_layers(model).items():
        if f"{name}.key_tokens" in tensors:
            layer.append(tensors[f"{name}.key_tokens"], tensors[f"{name}.value_tokens"])
    model.config = adapter.base.grown(adapter.param_tokens, before)
    model.adapters = (*model.adapters, LoadedAdapter(adapter, before, model.config))


def _require_unchanged(model: LanguageModel) -> None:
    if not model.adapters:
        return
    expected = model.adapters[-1].after
    same = model.config == expected and all(
        layer.groups == expected.groups(role) for role, layer in pattention_layers(model).values()
    )
    if not same:
        raise TokenFormerError(
            "adapter: the groups of parameter tokens have changed since the adapters were loaded; "
            "call merge_adapters before growing or consolidating"
        )
