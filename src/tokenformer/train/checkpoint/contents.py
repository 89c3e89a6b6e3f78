"""What a checkpoint holds, and its directory: written whole by one process or by all ranks, read by any number.

A checkpoint is trusted local state: the tensors are in torch.distributed.checkpoint's format, whose metadata is
pickled. Only model directories travel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.files import new_directory, read_json, read_text, write_json, write_text
from tokenformer.language.tokenizers import Tokenizer, load_tokenizer
from tokenformer.models.base import LanguageModel
from tokenformer.models.config import DecoderConfig
from tokenformer.models.empty import empty_model
from tokenformer.models.registry import load_config
from tokenformer.parallel.local import local_part
from tokenformer.train.checkpoint.manifest import describe_files, require_whole, write_manifest
from tokenformer.train.checkpoint.ranks import Ranks
from tokenformer.train.checkpoint.tensors import (
    METADATA_FILE,
    WritePlan,
    WrittenShare,
    load_into,
    load_tensors,
    plan_writes,
    stored_shapes,
    write_metadata,
    write_share,
)
from tokenformer.train.optimizer import Moments
from tokenformer.train.state import STATE_FILE, TrainingState, is_checkpoint, read_state

_TENSORS = "tensors"
_OPTIMIZER = "optimizer.json"
_RUN_CONFIG = "run.yaml"
_MODEL, _MOMENTS, _RNG = "model.", "moments.", "rng."
_MOMENT_NAME = re.compile(r"moments\.(.+)\.(\w+)")


@dataclass(frozen=True)
class TrainingCheckpoint:
    """What a checkpoint holds. ``moments`` are the optimiser's by parameter name (a parameter that is absent starts
    at step 0); ``run_config`` the YAML of the run that wrote it; ``rng`` the generator states by device type.

    Weights and moments may be DTensors; then all ranks write it together.
    """

    model: LanguageModel
    moments: Moments
    state: TrainingState
    tokenizer: Tokenizer | None = None
    run_config: str | None = None
    rng: Mapping[str, Tensor] = field(default_factory=dict)

    def contents(self) -> CheckpointContents:
        """The same, ready to be written; the tensors are the live ones, not copies."""
        tensors = {f"{_MODEL}{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, entry in self.moments.items():
            tensors |= {f"{_MOMENTS}{name}.{key}": tensor for key, tensor in entry.items()}
        tensors |= {f"{_RNG}{name}": tensor for name, tensor in self.rng.items()}
        fresh = [name for name, _ in self.model.named_parameters() if name not in self.moments]
        return CheckpointContents(
            self.model.config, tensors, fresh, self.state, self.tokenizer, self.run_config
        )


@dataclass(frozen=True)
class CheckpointContents:
    """A checkpoint taken apart: ``tensors`` by the names they are stored by; ``without_moments`` the parameters whose
    optimiser state starts at step 0."""

    config: DecoderConfig
    tensors: dict[str, Tensor]
    without_moments: list[str]
    state: TrainingState
    tokenizer: Tokenizer | None
    run_config: str | None


def write_checkpoint(
    directory: Path | str, checkpoint: TrainingCheckpoint, *, ranks: Ranks | None = None
) -> None:
    """Write ``checkpoint`` to ``directory``, as :func:`write_contents` does."""
    write_contents(directory, checkpoint.contents(), ranks=ranks)


ShareWriter = Callable[[Path, bytes], WrittenShare]
"""Writes this rank's part of a plan to a directory."""


def plan_contents(contents: CheckpointContents, ranks: Ranks) -> WritePlan:
    """Share the tensors among the ranks, which all call this. The plan serves for all contents whose tensors have the
    same names, shapes and layouts."""
    tensors = contents.tensors
    if ranks.rank:  # each rank has generators of its own; the first one's are kept
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_RNG)}
    return plan_writes(tensors, ranks)


def write_contents(
    directory: Path | str,
    contents: CheckpointContents,
    *,
    ranks: Ranks | None = None,
    plan: WritePlan | None = None,
    write: ShareWriter | None = None,
) -> None:
    """Write a checkpoint to ``directory``, which must be free; it appears when complete.

    Args:
        directory: of all ranks the same, on a file system that all reach.
        contents: of each rank; all but the local parts of the tensors agree.
        ranks: those that write it together; this process alone by default.
        plan: of contents like these; made here by default.
        write: writes the tensors; from those in ``contents`` by default.

    Raises:
        TokenFormerError: the directory holds something, the disk refuses (full, not writable), or another rank
            failed; nothing is left.
    """
    ranks = ranks or Ranks()
    directory = Path(directory)
    with ExitStack() as stack:

        def begin() -> Path:
            scratch = stack.enter_context(new_directory(directory))
            (scratch / _TENSORS).mkdir()
            return scratch

        scratch = ranks.first(begin)
        plan = plan or plan_contents(contents, ranks)
        mine, write = plan.mine, write or partial(_write_tensors, contents.tensors)
        shares = ranks.each(lambda: write(scratch / _TENSORS, mine))

        def complete() -> None:
            metadata = write_metadata(scratch / _TENSORS, plan.metadata, [share.places for share in shares])
            records = {METADATA_FILE: metadata} | {k: v for share in shares for k, v in share.records.items()}
            _write_small_files(scratch, contents)
            small = describe_files(scratch, [path for path in scratch.iterdir() if path.is_file()])
            write_manifest(
                scratch, small | {f"{_TENSORS}/{name}": record for name, record in records.items()}
            )
            stack.close()

        ranks.first(complete)


def _write_tensors(tensors: Mapping[str, Tensor], directory: Path, plan: bytes) -> WrittenShare:
    return write_share(
        directory, plan, {name: local_part(tensor.detach()) for name, tensor in tensors.items()}
    )


def read_checkpoint(directory: Path | str, *, verify: bool = True) -> TrainingCheckpoint:
    """Read a checkpoint whole; the model (float32, CPU) is built from the checkpoint's own ``config.json``.

    Args:
        directory: of one process or of many ranks.
        verify: compare every file with the manifest first.

    Raises:
        TokenFormerError: no checkpoint, a missing or damaged file, tensors that are not this model's.
    """
    directory = Path(directory)
    require_checkpoint(directory)
    if verify:
        require_whole(directory)
    model = read_outline(directory)
    tensors = load_tensors(directory / _TENSORS)
    weights = {name.removeprefix(_MODEL): t for name, t in tensors.items() if name.startswith(_MODEL)}
    model.load_state_dict(weights, strict=True, assign=True)
    return TrainingCheckpoint(
        model=model,
        moments=_moments(tensors),
        state=read_state(directory),
        tokenizer=load_tokenizer(directory) if (directory / "tokenizer.json").exists() else None,
        run_config=read_run_config(directory),
        rng={name.removeprefix(_RNG): t for name, t in tensors.items() if name.startswith(_RNG)},
    )


def read_model(directory: Path | str) -> LanguageModel:
    """The model of a checkpoint alone (float32, CPU).

    Raises:
        TokenFormerError: no checkpoint, missing or damaged tensors, or not this model's.
    """
    directory = Path(directory)
    require_checkpoint(directory)
    model = read_outline(directory)
    weights = load_tensors(directory / _TENSORS, _MODEL)
    model.load_state_dict({name.removeprefix(_MODEL): t for name, t in weights.items()}, assign=True)
    return model


def read_outline(directory: Path) -> LanguageModel:
    """The model of a checkpoint on the meta device: names and shapes, found to be those of the tensors that are stored.

    Raises:
        TokenFormerError: missing or damaged metadata, tensors that are not this model's.
    """
    model = empty_model(load_config(directory))
    _require_names(directory, model)
    return model


def load_model_into(directory: Path | str, model: LanguageModel) -> None:
    """Fill the weights of ``model``, in place and in whatever layout they have (plain tensors or DTensors).

    Raises:
        TokenFormerError: a missing or extra tensor or another shape, missing or damaged files.
    """
    directory = Path(directory)
    _require_names(directory, model)
    weights = {f"{_MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
    load_into(directory / _TENSORS, weights)


def load_moments(directory: Path | str, model: LanguageModel) -> Moments:
    """The optimiser's moments, laid out as the parameters of ``model`` are; a parameter without any is absent.

    Raises:
        TokenFormerError: moments of a parameter that the model does not have or of another shape, missing or
            damaged files.
    """
    directory = Path(directory)
    _require_names(directory, model)
    parameters = dict(model.named_parameters())
    shapes = stored_shapes(directory / _TENSORS)
    tensors = {}
    for name, shape in shapes.items():
        if match := _MOMENT_NAME.fullmatch(name):
            parameter = parameters[match.group(1)].detach()
            tensors[name] = (
                torch.zeros_like(parameter, dtype=torch.float32)
                if shape == tuple(parameter.shape)
                else torch.zeros(shape, device=parameter.device)
            )
    load_into(directory / _TENSORS, tensors)
    return _moments(tensors)


def read_rng(directory: Path | str) -> dict[str, Tensor]:
    """The generator states of a checkpoint by device type."""
    tensors = load_tensors(Path(directory) / _TENSORS, _RNG)
    return {name.removeprefix(_RNG): tensor for name, tensor in tensors.items()}


def read_run_config(directory: Path | str) -> str | None:
    """The YAML of the run that wrote a checkpoint, None where it was made outside of a run."""
    path = Path(directory) / _RUN_CONFIG
    return read_text(path, "the configuration of a run") if path.exists() else None


def require_checkpoint(directory: Path) -> None:
    """Refuse what is no checkpoint.

    Raises:
        TokenFormerError: there is no ``state.json``.
    """
    if not is_checkpoint(directory):
        raise TokenFormerError(f"{directory}: no training checkpoint (there is no {STATE_FILE} in it)")


def _write_small_files(scratch: Path, contents: CheckpointContents) -> None:
    write_json(scratch / "config.json", contents.config.to_json())
    write_json(scratch / STATE_FILE, contents.state.model_dump(mode="json"))
    write_json(scratch / _OPTIMIZER, {"format_version": 1, "without_moments": contents.without_moments})
    if contents.tokenizer is not None:
        contents.tokenizer.save(scratch)
    if contents.run_config is not None:
        write_text(scratch / _RUN_CONFIG, contents.run_config)


def _require_names(directory: Path, model: LanguageModel) -> None:
    """Refuse tensors that are not exactly the model's weights and the moments that the checkpoint says it has."""
    shapes = stored_shapes(directory / _TENSORS)
    expected: dict[str, tuple[int, ...]] = {
        f"{_MODEL}{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    stored = {name: shape for name, shape in shapes.items() if name.startswith(_MODEL)}
    for name in sorted(expected.keys() | stored.keys()):
        found = stored.get(name, "no such tensor")
        wanted = expected.get(name, "no such tensor")
        if found != wanted:
            raise TokenFormerError(
                f"{directory}: {name.removeprefix(_MODEL)}: found {found}, expected {wanted} by the checkpoint's "
                "config.json"
            )
    without = read_json(directory / _OPTIMIZER, "which parameters have no optimiser state")["without_moments"]
    parameters = {name for name, _ in model.named_parameters()}
    with_moments = {match.group(1) for name in shapes if (match := _MOMENT_NAME.fullmatch(name))}
    for name in sorted(with_moments ^ (parameters - set(without))):
        found = "optimiser state" if name in with_moments else "no optimiser state"
        wanted = "none" if name in with_moments else "some"
        raise TokenFormerError(f"{directory}: {name}: found {found}, expected {wanted} by {_OPTIMIZER}")


def _moments(tensors: Mapping[str, Tensor]) -> Moments:
    moments: Moments = {}
    for name, tensor in tensors.items():
        if match := _MOMENT_NAME.fullmatch(name):
            moments.setdefault(match.group(1), {})[match.group(2)] = tensor
    return moments
