"""The conversions there are, by name. No torch here: a conversion is imported when it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tokenformer.errors import TokenFormerError
from tokenformer.models.config import DecoderConfig


class Converted(NamedTuple):
    """What a conversion wrote.

    ``config``: of the model that was written; ``tensors``: how many were mapped; ``dtype``: of the foreign file
    (``float32``, ...); ``has_tokenizer``: whether a ``tokenizer.json`` came along; ``changes``: what had to be
    rewritten for the same function, in words; without any, weights are the same bit for bit.
    """

    directory: Path
    config: DecoderConfig
    tensors: int
    dtype: str
    has_tokenizer: bool
    changes: tuple[str, ...] = ()


class ConvertedData(NamedTuple):
    """What a conversion of a data directory wrote: how many documents of each split."""

    directory: Path
    documents: dict[str, int]


Convert = Callable[[Path, Path], Converted | ConvertedData]

_CONVERSIONS = {
    ("official", "native"): "tokenformer.interop.official:official_to_native",
    ("native", "native"): "tokenformer.interop.native:native_to_native",
    ("native", "official"): "tokenformer.interop.official_export:native_to_official",
    ("gpt-neox", "native"): "tokenformer.interop.gpt_neox:gpt_neox_to_native",
    ("native", "gpt-neox"): "tokenformer.interop.gpt_neox:native_to_gpt_neox",
    ("native", "arrayrecord"): "tokenformer.interop.array_record:data_to_array_record",
}
_WITH_CONFIG = {("official", "native")}


def find_conversion(
    source_format: str,
    target_format: str,
    *,
    config: Path | None = None,
    adapters: Sequence[Path] = (),
    consolidate: bool = False,
) -> Convert:
    """The function that converts a directory of one format to another: ``convert(source, target)``.

    Args:
        source_format: ``official``, ``gpt-neox`` or ``native``.
        target_format: likewise, or ``arrayrecord`` of a data directory.
        config: a configuration to read instead of the one in the source, for the formats that have them apart.

        adapters: of ``native`` to ``native``: what to merge in.
        consolidate: of ``native`` to ``native``: make one group of all parameter tokens of a layer.

    Raises:
        TokenFormerError: this pair is not known, the message lists those that are; or it takes no such option.
    """
    pair = (source_format, target_format)
    place = _CONVERSIONS.get(pair)
    if place is None:
        known = "; ".join(f"{source} to {target}" for source, target in _CONVERSIONS)
        raise TokenFormerError(f"convert: {source_format} to {target_format} is not offered; known: {known}")
    module, name = place.split(":")
    convert: Callable[..., Converted | ConvertedData] = getattr(import_module(module), name)
    if pair == ("native", "native"):
        convert = partial(convert, adapters=adapters, consolidate=consolidate)
    elif adapters or consolidate:
        raise TokenFormerError(
            f"{'--adapter' if adapters else '--consolidate'}: belongs to native to native; convert its result to "
            f"{target_format}"
        )
    if config is None:
        return convert
    if pair not in _WITH_CONFIG:
        raise TokenFormerError(
            f"--config: {source_format} to {target_format} reads the configuration in the source alone"
        )
    return partial(convert, config=config)
