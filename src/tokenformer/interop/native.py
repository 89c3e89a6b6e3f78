"""A model directory with adapters merged in, or with its groups of parameter tokens consolidated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenformer.adapters.apply import load_with_adapters, merge_adapters
from tokenformer.errors import TokenFormerError
from tokenformer.files import require_free
from tokenformer.interop.formats import Converted
from tokenformer.models.card import model_card
from tokenformer.models.directory import save_model
from tokenformer.models.paths import resolve_model_directory
from tokenformer.models.registry import load_config
from tokenformer.models.tokenformer.config import TokenFormerConfig


def native_to_native(
    source: Path, target: Path, *, adapters: Sequence[Path] = (), consolidate: bool = False
) -> Converted:
    """Write the model of ``source`` with ``adapters`` in it to ``target``, a model directory like any other.

    Args:
        source: a model or run directory, which stays as it is.
        target: must be free.
        adapters: directories of adapters of that model, or their runs.
        consolidate: merge all groups of each layer into one; otherwise each adapter stays a group of its own.

    Raises:
        TokenFormerError: neither is asked for, the model has no parameter tokens, an adapter of another model, or
            ``target`` holds something.
    """
    if not adapters and not consolidate:
        raise TokenFormerError(
            "convert: native to native needs --adapter DIR or --consolidate; else it is a copy"
        )
    require_free(target)
    directory = resolve_model_directory(source)
    if not isinstance(load_config(directory), TokenFormerConfig):
        raise TokenFormerError(f"{directory}: has no parameter tokens, so that there is nothing to merge")
    model = load_with_adapters(directory, adapters)
    names = [loaded.config.name for loaded in model.adapters]
    merge_adapters(model, consolidate=consolidate)
    changes = [f"adapter {name} merged in" for name in names]
    changes += (
        ["groups of parameter tokens consolidated: the same function up to rounding"] if consolidate else []
    )
    tokenizer = directory / "tokenizer.json"
    card = model_card(
        model.config, {"Conversion": {"from": directory.resolve().name, "changes": "; ".join(changes)}}
    )
    save_model(model, target, card=card, tokenizer=tokenizer if tokenizer.is_file() else None)
    weights = model.state_dict()
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    return Converted(target, model.config, len(weights), dtype, tokenizer.is_file(), tuple(changes))
