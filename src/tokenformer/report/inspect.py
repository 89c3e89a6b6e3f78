"""What ``inspect`` shows of a model, adapter, run, checkpoint or data directory, or of a recipe. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenformer.adapters.config import is_adapter_directory
from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DATASET_FILE
from tokenformer.models.paths import is_model_directory
from tokenformer.report.inspect_adapter import describe_adapter
from tokenformer.report.inspect_data import describe_data
from tokenformer.report.inspect_model import describe_model
from tokenformer.report.inspect_run import (
    describe_checkpoint,
    describe_recipe,
    describe_run,
    is_run_directory,
)
from tokenformer.report.tables import Table
from tokenformer.train.memory import TrainingSetup
from tokenformer.train.state import is_checkpoint


class Inspection(NamedTuple):
    """``data``: all facts, ready for JSON (``kind`` and ``path`` first); ``tables``: the same for people."""

    data: dict[str, Any]
    tables: list[Table]


def inspect_path(
    path: Path | str, setup: Callable[[int], TrainingSetup] | None = None, devices: int | None = None
) -> Inspection:
    """Describe what lies at ``path``; ``setup`` (of the model's context) says for which training the memory of a model
    is predicted, ``devices`` on how many that of a recipe or run (by default those that its mesh asks for).

    Raises:
        TokenFormerError: nothing of ours is there, or it is damaged.
    """
    path = Path(path)
    if is_checkpoint(path):  # holds a config.json too
        return Inspection(*describe_checkpoint(path))
    if (path / DATASET_FILE).is_file():
        return Inspection(*describe_data(path))
    if is_model_directory(path):
        return Inspection(*describe_model(path, setup))
    if is_adapter_directory(path):
        return Inspection(*describe_adapter(path))
    if is_run_directory(path):
        return Inspection(*describe_run(path, devices))
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return Inspection(*describe_recipe(path, devices))
    found = "a file" if path.is_file() else "none of their files" if path.is_dir() else "nothing"
    raise TokenFormerError(
        f"{path}: found {found}; expected a model directory (config.json), a run directory (config.yaml), a training "
        f"checkpoint (state.json), a data directory ({DATASET_FILE}), an adapter (adapter_config.json) or a recipe "
        "(.yaml)"
    )
