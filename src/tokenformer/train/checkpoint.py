"""Training checkpoints: everything needed to go on, complete under their name or not there at all.

A checkpoint is trusted local state: the tensors are in torch.distributed.checkpoint's format, whose metadata is
pickled. Only model directories travel.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tokenformer.errors import TokenFormerError
from tokenformer.files import new_directory, read_text, write_json, write_text
from tokenformer.language.tokenizers import Tokenizer, load_tokenizer
from tokenformer.models.base import LanguageModel
from tokenformer.models.registry import load_config, model_class
from tokenformer.train.optimizer import STATE_KEYS, Moments
from tokenformer.train.state import STATE_FILE, TrainingState, is_checkpoint, read_state

_TENSORS = "tensors"
_RUN_CONFIG = "run.yaml"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_MOMENT_NAME = re.compile(rf"moments\.(.+)\.({'|'.join(STATE_KEYS)})")


@dataclass(frozen=True)
class TrainingCheckpoint:
    """What a checkpoint holds. ``moments`` are the optimiser's by parameter name (a parameter that is absent
    starts afresh); ``run_config`` the YAML of the run that wrote it;
    ``rng`` the generator states by device type."""

    model: LanguageModel
    moments: Moments
    state: TrainingState
    tokenizer: Tokenizer | None = None
    run_config: str | None = None
    rng: Mapping[str, Tensor] = field(default_factory=dict)


def write_checkpoint(directory: Path | str, checkpoint: TrainingCheckpoint) -> None:
    """Write ``checkpoint`` to ``directory``, which must be free.

    Raises:
        TokenFormerError: the directory holds something, or the disk refuses (full, not writable); nothing is left.
    """
    with new_directory(directory) as scratch:
        write_json(scratch / "config.json", checkpoint.model.config.to_json())
        write_json(scratch / STATE_FILE, checkpoint.state.model_dump(mode="json"))
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save(scratch)
        if checkpoint.run_config is not None:
            write_text(scratch / _RUN_CONFIG, checkpoint.run_config)
        _save_tensors(_flatten(checkpoint), scratch / _TENSORS)


def read_checkpoint(directory: Path | str) -> TrainingCheckpoint:
    """Read a checkpoint; the model (float32, CPU) is built from the checkpoint's own ``config.json``.

    Raises:
        TokenFormerError: no checkpoint, a missing or damaged file, tensors that are not this model's.
    """
    directory = Path(directory)
    if not is_checkpoint(directory):
        raise TokenFormerError(f"{directory}: no training checkpoint (there is no {STATE_FILE} in it)")
    state, config = read_state(directory), load_config(directory)
    tensors = _load_tensors(directory / _TENSORS)
    with torch.device("meta"):
        model: LanguageModel = model_class(config.architecture)(config)
    _load_weights(
        model, {name[6:]: tensors[name] for name in tensors if name.startswith("model.")}, directory
    )
    return TrainingCheckpoint(
        model=model,
        moments=_read_moments(tensors),
        state=state,
        tokenizer=load_tokenizer(directory) if (directory / "tokenizer.json").exists() else None,
        run_config=read_run_config(directory),
        rng={name[4:]: tensor for name, tensor in tensors.items() if name.startswith("rng.")},
    )


def read_run_config(directory: Path | str) -> str | None:
    """The YAML of the run that wrote a checkpoint, None where it was made outside of a run."""
    path = Path(directory) / _RUN_CONFIG
    return read_text(path, "the configuration of a run") if path.exists() else None


def checkpoint_path(run: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of ``step``."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    steps = {
        int(match.group(1)): path
        for path in (run / "checkpoints").glob("step-*")
        if (match := _STEP_NAME.fullmatch(path.name))
    }
    return [steps[step] for step in sorted(steps)]


def prune_checkpoints(run: Path, keep_last: int) -> None:
    """Remove all but the newest ``keep_last`` checkpoints, and remains of interrupted writing."""
    for path in list_checkpoints(run)[:-keep_last]:
        condemned = path.with_name(f".{path.name}.removed")
        path.rename(condemned)  # a half-removed checkpoint must not carry a checkpoint's name
        shutil.rmtree(condemned, ignore_errors=True)
    for remains in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(remains, ignore_errors=True)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators: the CPU's and the device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put generator states back; one of a device that is not in use is left out."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _flatten(checkpoint: TrainingCheckpoint) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint.model.state_dict().items()}
    for name, entry in checkpoint.moments.items():
        tensors |= {f"moments.{name}.{key}": tensor for key, tensor in entry.items()}
    return tensors | {f"rng.{name}": tensor for name, tensor in checkpoint.rng.items()}


def _read_moments(tensors: Mapping[str, Tensor]) -> Moments:
    moments: Moments = {}
    for name, tensor in tensors.items():
        if match := _MOMENT_NAME.fullmatch(name):
            moments.setdefault(match.group(1), {})[match.group(2)] = tensor
    return moments


def _load_weights(model: LanguageModel, weights: Mapping[str, Tensor], directory: Path) -> None:
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        found = tuple(weights[name].shape) if name in weights else "no such tensor"
        wanted = tuple(expected[name].shape) if name in expected else "no such tensor"
        if found != wanted:
            raise TokenFormerError(
                f"{directory}: {name}: found {found}, expected {wanted} by the checkpoint's config.json"
            )
    model.load_state_dict(dict(weights), strict=True, assign=True)


def _save_tensors(tensors: dict[str, Tensor], directory: Path) -> None:
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        with _single_process():
            dcp.save(detached, checkpoint_id=directory, no_dist=True)
    except CheckpointException as error:  # a BaseException, so nothing further out would catch it
        cause = _cause(error)
        if isinstance(cause, OSError):
            raise cause from error
        raise TokenFormerError(f"{directory}: could not be written ({cause})") from error


def _load_tensors(directory: Path) -> dict[str, Tensor]:
    try:
        metadata = dcp.FileSystemReader(directory).read_metadata()
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with _single_process():
            dcp.load(tensors, checkpoint_id=directory, no_dist=True)
    except CheckpointException as error:
        cause = _cause(error)  # an EOFError, of a file cut short, has no words of its own
        raise TokenFormerError(
            f"{directory}: missing or damaged ({type(cause).__name__}: {cause})"
        ) from error
    except Exception as error:  # the pickled metadata of a damaged file can fail in any way
        raise TokenFormerError(
            f"{directory}: missing or damaged ({type(error).__name__}: {error})"
        ) from error
    return tensors


@contextmanager
def _single_process() -> Iterator[None]:
    """dcp remarks on every call that torch.distributed is not in use, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _cause(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0] if error.failures else error
