"""A small data directory and small runs on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drills.subject import MODEL, write_data

from tokenformer.train.checkpoint.manifest import MANIFEST_FILE, describe_files, write_manifest
from tokenformer.train.config import RunConfig
from tokenformer.train.yaml_source import apply_overrides
from tokenformer.validation import validate

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte tokens of a few hundred lines with some structure in them."""
    return write_data(tmp_path_factory.mktemp("corpus") / "corpus", lines=600)


@pytest.fixture(scope="session")
def make_config(data_directory: Path) -> MakeConfig:
    """A run of a tiny TokenFormer; overrides as on the command line, or whole sections by keyword."""

    def make(*overrides: str, **sections: Any) -> RunConfig:
        values: dict[str, Any] = {
            "model": dict(MODEL),
            "data": {"path": str(data_directory), "sequence_length": 16, "batch_tokens": 64},
            "optimizer": {"lr": 1e-2},
            "evaluation": {"every_steps": None, "max_tokens": 256},
            "logging": {"every_steps": 2, "tensorboard": False},
            "checkpoint": {"every_steps": None},
        }
        values.update(sections)
        values = {name: value for name, value in values.items() if value is not None}
        if "stages" not in values:
            values.setdefault("steps", 6)
        return validate(RunConfig, apply_overrides(values, overrides), source="test")

    return make


@pytest.fixture(scope="session")
def ladder(make_config: MakeConfig) -> RunConfig:
    """Two growth steps, the second after the optimiser's moments of the first have grown old."""
    return make_config(
        stages=[
            {"name": "small", "steps": 4},
            {"name": "larger", "steps": 4, "grow": {"factor": 2}, "optimizer": {"lr": 5e-3}},
            {"name": "largest", "tokens": 256, "grow": {"qkv": 24, "ffn": 40}, "data": {"batch_tokens": 128}},
        ]
    )


@pytest.fixture
def reseal() -> Callable[[Path], None]:
    """Make the manifest of a checkpoint that of its files as they are, so that what was changed passes for whole."""

    def seal(checkpoint: Path) -> None:
        files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST_FILE]
        write_manifest(checkpoint, describe_files(checkpoint, files))

    return seal
