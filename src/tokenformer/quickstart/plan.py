"""What the quickstart does, read from ``plan.yaml``. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from tokenformer.errors import TokenFormerError
from tokenformer.growth.spec import GrowthSpec, grown_config
from tokenformer.models.config import DecoderConfig, PositiveInt
from tokenformer.train.config import RunConfig, StageConfig, StageSpec
from tokenformer.train.yaml_source import apply_overrides, parse_mapping
from tokenformer.validation import StrictModel, validate

RunName = Literal["small", "grown", "large", "transformer"]
_SOURCE = "quickstart"  # opens every message about the plan

RUNS: tuple[RunName, ...] = ("small", "grown", "large", "transformer")


class QuickstartPlan(StrictModel):
    """The whole story. ``shared`` and ``runs`` hold sections of run configurations, checked when they are put
    together; ``evaluation_tokens`` is how much held-out text each model is scored on at the end."""

    corpus: tuple[str, ...]
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]
    evaluation_tokens: PositiveInt
    grow: GrowthSpec
    prompt: Annotated[str, Field(min_length=1)]
    new_tokens: PositiveInt
    shared: dict[str, Any]
    runs: dict[RunName, dict[str, Any]]

    def to_yaml(self) -> str:
        """What :func:`load_plan` reads."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)

    def run_config(self, name: RunName, out: Path) -> RunConfig:
        """The configuration of one run: a single stage with the run's name, data and start in the quickstart's
        directory ``out``.

        Raises:
            TokenFormerError: wrong fields.
        """
        changes: dict[str, Any] = {}
        if name == "grown":
            changes["init_from"] = str(out / "grown-start")
        elif name != "small":
            changes["steps"] = self.steps_from_scratch(name, out)
        config = self._validated(name, out / "data", changes)
        stage = StageSpec(name=name, steps=_only_stage(config).steps)
        return config.model_copy(update={"steps": None, "tokens": None, "stages": (stage,)})

    def steps_from_scratch(self, name: RunName, out: Path) -> int:
        """Steps after which ``name`` has used the FLOPs of ``small`` and ``grown`` together."""
        small, grown = self.run_config("small", out), self.run_config("grown", out)
        one_step = self._validated(name, out / "data", {"steps": 1, "tokens": None})
        budget = _flops(small, self.model_of("small")) + _flops(grown, self.model_of("grown"))
        return max(1, round(budget / _flops(one_step, self.model_of(name))))

    def model_of(self, name: RunName) -> DecoderConfig:
        """The configuration of the model that is trained in a run.

        Raises:
            TokenFormerError: wrong fields, or a growth that cannot be.
        """
        if name == "grown":
            try:
                return grown_config(self.model_of("small"), self.grow)
            except TokenFormerError as error:
                raise TokenFormerError(f"{_SOURCE}: grow: {error}") from error
        config = self._validated(name, Path(), {"steps": 1, "tokens": None})
        assert config.model is not None, "a run without model has init_from, which only 'grown' may have"
        return config.model

    def _validated(self, name: RunName, data: Path, changes: Mapping[str, Any]) -> RunConfig:
        """The sections of a run put together, with ``changes``; what the quickstart decides may not be given."""
        if name not in self.runs:
            raise TokenFormerError(f"{_SOURCE}: runs.{name}: missing, but required")
        values = _merged(self.shared, self.runs[name])
        decided = {"stages", "init_from"} | (set() if name in ("small", "grown") else {"steps", "tokens"})
        for field in sorted(decided & values.keys()):
            raise TokenFormerError(
                f"{_SOURCE}: runs.{name}.{field}: not to be set, the quickstart decides it"
            )
        section = values.setdefault("data", {})
        if isinstance(section, Mapping):  # anything else is refused below
            values["data"] = {**section, "path": str(data)}
        return validate(RunConfig, {**values, **changes}, source=_SOURCE, within=f"runs.{name}")


def load_plan(overrides: Sequence[str] = ()) -> QuickstartPlan:
    """The built-in plan, changed by ``field=value`` overrides, e.g. ``runs.small.steps=100``.

    Raises:
        TokenFormerError: wrong fields.
    """
    text = files("tokenformer.quickstart").joinpath("plan.yaml").read_text("utf-8")
    return parse_plan(text, overrides)


def parse_plan(text: str, overrides: Sequence[str] = (), *, source: str = _SOURCE) -> QuickstartPlan:
    """A plan from YAML text; ``source`` opens error messages.

    Raises:
        TokenFormerError: no valid YAML, or wrong fields.
    """
    values = apply_overrides(parse_mapping(text, source, "the plan of a quickstart"), overrides)
    return validate(QuickstartPlan, values, source=source)


def _only_stage(config: RunConfig) -> StageConfig:
    (stage,) = config.resolve()
    return stage


def _flops(config: RunConfig, model: DecoderConfig) -> float:
    data = config.data
    return data.tokens_before(_only_stage(config).steps) * model.flops_per_token(data.sequence_length)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, section by section."""
    merged = dict(base)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = {**merged[name], **value} if both else value
    return merged
