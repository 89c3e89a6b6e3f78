"""Everything that is checked before a run starts: device, output, data, and each model along the ladder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.data_mixture import DataMixture
from tokenformer.language.task import LanguageModelingTask
from tokenformer.language.tokenizers import Tokenizer, load_tokenizer
from tokenformer.models.base import LanguageModel
from tokenformer.models.config import DecoderConfig
from tokenformer.models.registry import load_config
from tokenformer.parallel.sizes import ALONE, MeshSizes, check_tensor_split
from tokenformer.train.adapter import AdapterRun
from tokenformer.train.checkpoint.ranks import Ranks
from tokenformer.train.compare import require_same_data
from tokenformer.train.config import RunConfig, StageConfig
from tokenformer.train.data_section import DataConfig
from tokenformer.train.device import check_float8, compute_dtype
from tokenformer.train.ladder import model_configs, num_growth_groups
from tokenformer.train.memory_check import check_training_memory
from tokenformer.train.optimizer import check_roles_and_groups
from tokenformer.train.start import (
    adapter_of,
    find_resume_point,
    initial_config,
    initial_tokenizer,
    require_same_model,
)
from tokenformer.train.state import read_state


@dataclass(frozen=True)
class RunPlan:
    """A run that may start. ``tasks`` belong to ``stages``; ``models`` to the stages from ``first_stage`` on;
    ``damaged`` says what is wrong with each checkpoint that is newer than ``resume_from``; ``adapter`` what alone is
    trained, where that is one."""

    config: RunConfig
    out: Path
    device: torch.device
    stages: list[StageConfig]
    tasks: list[LanguageModelingTask]
    models: list[DecoderConfig]
    first_stage: int
    resume_from: Path | None
    damaged: dict[Path, str]
    adapter: AdapterRun | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data, the same in all stages."""
        return self.tasks[-1].data.tokenizer

    @property
    def data(self) -> dict[str, dict[str, str | int]]:
        """What the data directories are, by path."""
        return _identities(self.tasks)


def make_plan(
    config: RunConfig,
    out: Path,
    device: torch.device,
    *,
    resume: bool,
    sizes: MeshSizes = ALONE,
    ranks: Ranks | None = None,
) -> RunPlan:
    """Check a run on ``device``, or on a mesh of such, without building its model; nothing is written. The first of
    ``ranks`` looks for the checkpoint to go on from.

    Raises:
        TokenFormerError: whatever would stop the run later: an unreachable device, an output that holds something
            else, another configuration than the checkpoint's, unusable data, another tokenizer, sizes that cannot be.
    """
    stages = config.resolve()
    for stage in stages:
        compute_dtype(stage.precision, device)
        check_float8(stage.precision, device, sizes.tensor)
    resume_from, damaged = (ranks or Ranks()).first(partial(find_resume_point, out, config, resume=resume))
    initial, first = initial_config(config) if resume_from is None else load_config(resume_from), 0
    if resume_from is not None:
        first = read_state(resume_from).stage
        if config.model is not None:
            require_same_model(initial, model_configs(config.model, stages)[first], resume_from)
    models = model_configs(initial, stages, first=first)
    for model, stage in zip(models, stages[first:], strict=True):
        check_tensor_split(model, sizes.tensor)
        check_training_memory(
            model,
            stage,
            device,
            sizes,
            reshard_after_forward=config.parallel.reshard_after_forward,
            is_adapter=config.adapter is not None,
        )
    tasks = _open_tasks([stage.data for stage in stages])
    tokenizer = initial_tokenizer(config) if resume_from is None else load_tokenizer(resume_from)
    for task, model in zip(tasks[first:], models, strict=True):
        task.check_model(model, tokenizer.sha256 if tokenizer is not None else None)
        task.check_model(model, tasks[-1].data.tokenizer.sha256)  # one tokenizer up the whole ladder
    if resume_from is not None:
        require_same_data(read_state(resume_from).data, _identities(tasks), str(resume_from))
    adapter = (ranks or Ranks()).first(partial(adapter_of, config, out, resume_from))
    return RunPlan(config, out, device, stages, tasks, models, first, resume_from, damaged, adapter)


def check_optimizers(plan: RunPlan, model: LanguageModel) -> None:
    """Check the roles and groups that the stages name against the models they will meet.

    Raises:
        TokenFormerError: a role or group that is not there.
    """
    for index, config in enumerate(plan.models, plan.first_stage):
        place = "optimizer" if plan.config.stages is None else f"stages.{index}.optimizer"
        check_roles_and_groups(plan.stages[index].optimizer, model, num_growth_groups(config), place)


def _identities(tasks: list[LanguageModelingTask]) -> dict[str, dict[str, str | int]]:
    parts = [part for task in tasks for part in task.data.components]
    return {str(part.data.path): part.data.identity for part in parts}


def _open_tasks(sections: list[DataConfig]) -> list[LanguageModelingTask]:
    paths = dict.fromkeys(part.path for section in sections for part in section.components)
    directories = {path: DataDirectory.open(path) for path in paths}
    tasks: dict[tuple[object, ...], LanguageModelingTask] = {}
    for section in sections:
        if section.stream not in tasks:
            mixture = DataMixture([(directories[part.path], part.weight) for part in section.components])
            tasks[section.stream] = LanguageModelingTask(
                mixture, section.sequence_length, section.seed, section.packing
            )
    return [tasks[section.stream] for section in sections]
