"""A run that trains an adapter: its base, what is trained, and the directory it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from tokenformer.adapters.card import adapter_card
from tokenformer.adapters.config import (
    EXPORT_DIRECTORY,
    AdapterBase,
    AdapterConfig,
    adapter_growth,
    added_tokens,
)
from tokenformer.adapters.directory import describe_base, save_adapter
from tokenformer.files import read_json, write_json
from tokenformer.growth.grow import grow_model
from tokenformer.models.base import LanguageModel
from tokenformer.models.config import DecoderConfig
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.train.checkpoint.contents import read_model
from tokenformer.train.config import RunConfig
from tokenformer.train.state import read_state
from tokenformer.validation import StrictModel, validate

ADAPTER_RUN_FILE = "adapter_run.json"
"""In the run directory of an adapter: its name and its base, as it was when the run began."""


class AdapterRun(StrictModel):
    """The adapter that a run trains."""

    name: str
    base: AdapterBase

    def card(self, config: DecoderConfig, facts: Mapping[str, Mapping[str, object]]) -> str:
        """The card of the adapter in a model of ``config``."""
        assert isinstance(config, TokenFormerConfig)
        added = added_tokens(self.base.config, config)
        return adapter_card(AdapterConfig(name=self.name, param_tokens=added, base=self.base), facts)


def find_adapter_run(config: RunConfig, source: Path, out: Path, *, resumes: bool) -> AdapterRun | None:
    """The adapter of a run; a new run reads all weights of its base ``source`` for their hash.

    Raises:
        TokenFormerError: the base can carry no adapter; of a run that goes on, ``adapter_run.json`` is missing.
    """
    if config.adapter is None:
        return None
    path = out / ADAPTER_RUN_FILE
    if resumes:
        found = read_json(path, "the base of the adapter that this run trains")
        return validate(AdapterRun, found, source=str(path))
    return AdapterRun(name=config.adapter.name or out.resolve().name, base=describe_base(source))


def write_adapter_run(adapter: AdapterRun, out: Path) -> None:
    """Keep with the run what :func:`find_adapter_run` found when it began."""
    write_json(out / ADAPTER_RUN_FILE, adapter.model_dump(mode="json"))


def start_adapter(base: LanguageModel, config: RunConfig) -> LanguageModel:
    """``base`` with fresh parameter tokens that do not move its function."""
    assert config.adapter is not None
    model: LanguageModel = grow_model(
        base, adapter_growth(base.config, config.adapter), seed=config.seed
    ).model
    return model


def is_adapter_run(run: Path) -> bool:
    """Whether a run directory trains an adapter."""
    return (run / ADAPTER_RUN_FILE).is_file()


def export_adapter(checkpoint: Path, run: Path, card: str) -> None:
    """Write the adapter in a checkpoint to the run's ``adapter/``, in place of what is there.

    Raises:
        TokenFormerError: the checkpoint is damaged, or the disk refuses.
    """
    path = run / ADAPTER_RUN_FILE
    found = validate(AdapterRun, read_json(path, "the base of an adapter"), source=str(path))
    with torch.no_grad():
        save_adapter(
            read_model(checkpoint),
            run / EXPORT_DIRECTORY,
            base=found.base,
            name=found.name,
            training=read_state(checkpoint).counters(),
            card=card,
            replace=True,
        )
