"""Where a run begins: fresh weights, a model directory, a checkpoint, or its own newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tokenformer.adapters.config import adapter_growth
from tokenformer.errors import TokenFormerError
from tokenformer.files import require_free
from tokenformer.growth.spec import grown_config
from tokenformer.language.tokenizers import Tokenizer, load_tokenizer
from tokenformer.models.base import LanguageModel
from tokenformer.models.config import DecoderConfig
from tokenformer.models.directory import load_model
from tokenformer.models.paths import resolve_model_directory
from tokenformer.models.registry import build_model, load_config
from tokenformer.train.adapter import AdapterRun, find_adapter_run, start_adapter
from tokenformer.train.checkpoint.contents import (
    TrainingCheckpoint,
    read_checkpoint,
    read_outline,
    read_rng,
    read_run_config,
)
from tokenformer.train.checkpoint.folder import WholeCheckpoint, find_newest_whole
from tokenformer.train.compare import DataIdentities, require_same_run
from tokenformer.train.config import CONFIG_FILE, RunConfig, parse_run_config
from tokenformer.train.lock import is_in_use
from tokenformer.train.optimizer import Moments
from tokenformer.train.state import TrainingState, is_checkpoint, read_state


@dataclass
class Learned:
    """What a run has learned so far; it changes as the run goes on. With ``unread``, a checkpoint, the model is an
    outline on the meta device: weights and moments are still to be read from there."""

    model: LanguageModel
    moments: Moments = field(default_factory=dict)
    state: TrainingState = field(default_factory=TrainingState)
    rng: Mapping[str, Tensor] = field(default_factory=dict)
    unread: Path | None = None


def find_resume_point(out: Path, config: RunConfig, *, resume: bool) -> WholeCheckpoint:
    """The newest whole checkpoint to go on from (its ``path`` is None to start), and what is wrong with newer ones.

    Raises:
        TokenFormerError: ``out`` holds a run and ``resume`` is false, or something that is no run; none of the run's
            checkpoints is whole; or it was made with another configuration.
    """
    nothing = WholeCheckpoint(None, {})
    if not is_in_use(out):
        return nothing
    is_run = (out / CONFIG_FILE).is_file()
    if resume and is_run:
        found = find_newest_whole(out)
        if found.path is None:
            return nothing
        text = read_run_config(found.path)
        if text is None:
            raise TokenFormerError(
                f"{found.path}: does not say which run wrote it; name it in init_from instead"
            )
        require_same_run(parse_run_config(text, source=str(found.path)), config, str(found.path))
        return found
    if is_run:
        raise TokenFormerError(f"{out}: a run is already there; go on with --resume, or name another --out")
    require_free(out)
    return nothing


def initial_config(config: RunConfig) -> DecoderConfig:
    """Configuration of the model that the run begins with; reads no tensors.

    Raises:
        TokenFormerError: ``init_from`` is neither a model directory nor a checkpoint, or can carry no adapter.
    """
    if config.model is not None:
        return config.model
    found = load_config(_source(config))
    return found if config.adapter is None else grown_config(found, adapter_growth(found, config.adapter))


def adapter_of(config: RunConfig, out: Path, resume_from: Path | None) -> AdapterRun | None:
    """The adapter that a run trains, None for any other run; a new one reads all weights of its base.

    Raises:
        TokenFormerError: the base cannot be read, or the run does not say any more what it was.
    """
    if config.adapter is None:
        return None
    source = out if resume_from is not None else _source(config)
    return find_adapter_run(config, source, out, resumes=resume_from is not None)


def initial_tokenizer(config: RunConfig) -> Tokenizer | None:
    """The tokenizer that came with ``init_from``, None where there is none."""
    if config.init_from is None:
        return None
    source = _source(config)
    return load_tokenizer(source) if (source / "tokenizer.json").is_file() else None


def begin(config: RunConfig, data: DataIdentities) -> Learned:
    """The start of a new run on ``data``. From a checkpoint, moments and counters carry on, the position in the data
    too where it is the same data in the same order; stages are counted anew. From a model directory only the weights
    come."""
    state = TrainingState(seed=config.seed, data_seed=config.data.seed)
    if config.model is not None:
        return Learned(build_model(config.model, seed=config.seed), state=state)
    source = _source(config)
    if not is_checkpoint(source):
        model = load_model(source, dtype=torch.float32)
        for parameter in model.parameters():  # mapped from the file: a copy of its own, aligned as any other
            parameter.data = parameter.data.clone()
        return Learned(model if config.adapter is None else start_adapter(model, config), state=state)
    checkpoint = read_checkpoint(source)
    changed = {"stage": 0, "stage_step": 0, "seed": config.seed, "data_seed": config.data.seed}
    changed |= {"window_nats": 0, "window_targets": 0}
    same = all(data[path] == was for path, was in checkpoint.state.data.items() if path in data)
    if not (same and _same_stream(checkpoint, config, source)):
        changed["next_sample"] = 0
    return Learned(
        checkpoint.model, checkpoint.moments, checkpoint.state.model_copy(update=changed), checkpoint.rng
    )


def go_on(path: Path) -> Learned:
    """The start of a resumed run, from its checkpoint ``path``, which was found to be whole; it is left ``unread``.

    Raises:
        TokenFormerError: tensors that are not its model's.
    """
    return Learned(read_outline(path), state=read_state(path), rng=read_rng(path), unread=path)


def require_same_model(found: DecoderConfig, expected: DecoderConfig, path: Path) -> None:
    """Refuse a checkpoint of another model; what growth records of its past (history) does not count.

    Raises:
        TokenFormerError: names each field that differs.
    """
    before, now = (config.model_dump(mode="json", exclude={"growth_history"}) for config in (found, expected))
    differing = [
        f"{name}: {before.get(name)!r} in the checkpoint, {now.get(name)!r} expected"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise TokenFormerError(f"{path}: a checkpoint of another model: " + "; ".join(differing))


def _same_stream(checkpoint: TrainingCheckpoint, config: RunConfig, source: Path) -> bool:
    """Whether the checkpoint's position in the data means something in the new run's first stage."""
    if checkpoint.run_config is None:
        return True
    former = parse_run_config(checkpoint.run_config, source=str(source)).resolve()
    stage = min(checkpoint.state.stage, len(former) - 1)
    return former[stage].data.stream == config.resolve()[0].data.stream


def _source(config: RunConfig) -> Path:
    assert config.init_from is not None
    path = Path(config.init_from)
    if is_checkpoint(path):
        if config.adapter is not None:
            raise TokenFormerError(
                f"init_from: {path} is a training checkpoint; the base of an adapter is a model directory or a run"
            )
        return path
    try:
        return resolve_model_directory(path)
    except TokenFormerError as error:
        raise TokenFormerError(
            f"init_from: {error}, or a training checkpoint (RUN/checkpoints/step-...)"
        ) from error
