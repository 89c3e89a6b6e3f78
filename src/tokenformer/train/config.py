"""The configuration of a run: one YAML, validated whole before anything starts. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from tokenformer.adapters.config import AdapterSpec
from tokenformer.errors import TokenFormerError
from tokenformer.growth.spec import GrowthSpec
from tokenformer.models.config import PositiveInt
from tokenformer.models.registry import ModelConfig
from tokenformer.train.data_section import DataConfig, DataOverrides
from tokenformer.train.ladder import model_configs
from tokenformer.train.sections import (
    ActivationCheckpointingConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
    StabilityConfig,
)
from tokenformer.train.yaml_source import apply_overrides, parse_mapping, read_yaml
from tokenformer.validation import Int, StrictModel, explain, validate

Section = TypeVar("Section", bound=StrictModel)

CONFIG_FILE = "config.yaml"
"""The effective configuration in a run directory."""

_STAGE_SECTIONS = (
    "optimizer",
    "schedule",
    "precision",
    "activation_checkpointing",
    "stability",
    "checkpoint",
    "evaluation",
    "logging",
)


class StageSpec(StrictModel):
    """One rung of a ladder as written: its length, what to grow first, and the fields that differ from the run's.

    A section given here changes only the fields it names; the others keep the run's values.
    """

    name: str | None = None
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    grow: GrowthSpec | None = None
    data: DataOverrides | None = None
    optimizer: OptimizerConfig | None = None
    schedule: ScheduleConfig | None = None
    precision: PrecisionConfig | None = None
    activation_checkpointing: ActivationCheckpointingConfig | None = None
    stability: StabilityConfig | None = None
    checkpoint: CheckpointConfig | None = None
    evaluation: EvaluationConfig | None = None
    logging: LoggingConfig | None = None

    @model_validator(mode="after")
    def _check_length(self) -> StageSpec:
        _require_one(self, "steps", "tokens")
        return self


class StageConfig(StrictModel):
    """One rung with every section complete; ``steps`` optimiser steps."""

    name: str
    steps: PositiveInt
    grow: GrowthSpec | None
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    precision: PrecisionConfig
    activation_checkpointing: ActivationCheckpointingConfig
    stability: StabilityConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    logging: LoggingConfig


class RunConfig(StrictModel):
    """A run: from fresh weights (``model``) or from ``init_from`` (a model directory or a training checkpoint),
    over one stage (``steps`` or ``tokens``) or up a ladder (``stages``). With ``adapter`` the model directory
    ``init_from`` stays as it is, and parameter tokens beside it are trained."""

    model: ModelConfig | None = None
    init_from: str | None = None
    adapter: AdapterSpec | None = None
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    stability: StabilityConfig = StabilityConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    stages: tuple[StageSpec, ...] | None = None

    @model_validator(mode="after")
    def _check_whole(self) -> RunConfig:
        _require_one(self, "model", "init_from")
        _require_one(self, "steps", "tokens", "stages")
        if self.stages is not None and not self.stages:
            raise ValueError("stages is empty, expected at least one stage with steps or tokens")
        if self.model is not None and self.stages and self.stages[0].grow:
            raise ValueError(
                "stages.0.grow: the first stage starts from fresh weights; choose the sizes in model instead"
            )
        stages = self.resolve()
        if self.adapter is not None:
            self._check_adapter(stages)
        if self.model is not None:
            try:
                model_configs(self.model, stages)
            except TokenFormerError as error:
                raise ValueError(str(error)) from error
        return self

    def _check_adapter(self, stages: list[StageConfig]) -> None:
        if self.model is not None:
            raise ValueError("adapter: found model, expected init_from: the model directory of the base")
        for index, stage in enumerate(stages):
            if stage.grow is not None:
                raise ValueError(f"stages.{index}.grow: has no meaning with adapter, whose size stays")
            if stage.optimizer.frozen_groups or stage.optimizer.frozen_roles:
                raise ValueError(
                    "optimizer: frozen_groups and frozen_roles have no meaning with adapter: all but its tokens is "
                    "frozen already"
                )

    def resolve(self) -> list[StageConfig]:
        """The stages in order, each with complete sections: the run's, changed by what the stage names.

        Raises:
            ValueError: fields of the run and of a stage that do not go together.
        """
        specs = self.stages or (StageSpec(steps=self.steps, tokens=self.tokens),)
        return [self._resolve_stage(index, spec) for index, spec in enumerate(specs)]

    def _resolve_stage(self, index: int, spec: StageSpec) -> StageConfig:
        place = f"stages.{index}"
        data = _merge(self.data, spec.data, f"{place}.data")
        sections = {
            name: _merge(getattr(self, name), getattr(spec, name), f"{place}.{name}")
            for name in _STAGE_SECTIONS
        }
        steps = spec.steps or data.batch_sizes.steps_for(-(-(spec.tokens or 0) // data.sequence_length))
        return StageConfig(
            name=spec.name or f"stage {index}", steps=steps, grow=spec.grow, data=data, **sections
        )

    def to_yaml(self) -> str:
        """The effective configuration, every field written out; :func:`load_run_config` reads it back."""
        values = self.model_dump(mode="json", exclude_unset=False)
        if self.stages is not None:  # a stage's sections are differences: only what was written counts
            values["stages"] = [stage.model_dump(mode="json", exclude_unset=True) for stage in self.stages]
        return yaml.safe_dump(
            {name: value for name, value in values.items() if value is not None}, sort_keys=False
        )


def load_run_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply ``field=value`` overrides (``optimizer.lr=3e-4``, ``stages.0.steps=10``) and validate it.

    Raises:
        TokenFormerError: a missing or invalid file, an override that cannot be, wrong fields (all of them named).
    """
    values = apply_overrides(read_yaml(path, "a recipe: the configuration of a run"), overrides)
    return validate(RunConfig, values, source=str(path))


def parse_run_config(text: str, *, source: str) -> RunConfig:
    """Read back what :meth:`RunConfig.to_yaml` wrote; ``source`` opens error messages.

    Raises:
        TokenFormerError: not a run's configuration.
    """
    return validate(RunConfig, parse_mapping(text, source, "the configuration of a run"), source=source)


def _merge(base: Section, changes: StrictModel | None, place: str) -> Section:
    if changes is None:
        return base
    values: dict[str, Any] = base.model_dump()
    values.update(changes.model_dump(include=changes.model_fields_set))
    try:
        return type(base).model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error, type(base), place)) from error


def _require_one(model: BaseModel, *names: str) -> None:
    given = [name for name in names if getattr(model, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise ValueError(f"found {found}, expected exactly one of {', '.join(names)}")
