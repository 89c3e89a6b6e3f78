"""What the quickstart does, read from ``plan.yaml``. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from tokenformer.growth.spec import GrowthSpec, grown_config
from tokenformer.models.config import DecoderConfig, PositiveInt
from tokenformer.train.config import RunConfig
from tokenformer.train.yaml_source import apply_overrides, parse_mapping
from tokenformer.validation import StrictModel, validate

RunName = Literal["small", "grown", "large", "transformer"]
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
        """The configuration of one run, with data and start in the quickstart's directory ``out``.

        Raises:
            TokenFormerError: wrong fields.
        """
        values = _merged(self.shared, self.runs[name])
        values["data"] = {**values.get("data", {}), "path": str(out / "data")}
        if name == "grown":
            values["init_from"] = str(out / "grown-start")
        elif name != "small":
            values["steps"] = self.steps_from_scratch(name, out)
        return validate(RunConfig, values, source=f"runs.{name}")

    def steps_from_scratch(self, name: RunName, out: Path) -> int:
        """Steps after which ``name`` has used the FLOPs of ``small`` and ``grown`` together."""
        small, grown = self.run_config("small", out), self.run_config("grown", out)
        small_model = self.first_model("small")
        budget = _flops(small, small_model) + _flops(grown, grown_config(small_model, self.grow))
        probe = validate(
            RunConfig,
            {**_merged(self.shared, self.runs[name]), "data": small.data.model_dump(), "steps": 1},
            source=f"runs.{name}",
        )
        assert probe.model is not None
        return max(1, round(budget / _flops(probe, probe.model)))

    def first_model(self, name: RunName) -> DecoderConfig:
        """The model that ``small``, ``large`` or ``transformer`` starts from."""
        values = _merged(self.shared, self.runs[name])
        probe = {**values, "data": {**values.get("data", {}), "path": "."}}
        probe.setdefault("steps", 1)
        config = validate(RunConfig, probe, source=f"runs.{name}")
        assert config.model is not None
        return config.model


def load_plan(overrides: Sequence[str] = ()) -> QuickstartPlan:
    """The built-in plan, changed by ``field=value`` overrides, e.g. ``runs.small.steps=100``.

    Raises:
        TokenFormerError: wrong fields.
    """
    text = files("tokenformer.quickstart").joinpath("plan.yaml").read_text("utf-8")
    return parse_plan(text, overrides)


def parse_plan(text: str, overrides: Sequence[str] = ()) -> QuickstartPlan:
    """A plan from YAML text."""
    values = apply_overrides(parse_mapping(text, "quickstart", "the plan of a quickstart"), overrides)
    return validate(QuickstartPlan, values, source="quickstart")


def _flops(config: RunConfig, model: DecoderConfig) -> float:
    return sum(
        stage.steps * stage.data.batch_tokens * model.flops_per_token(stage.data.sequence_length)
        for stage in config.resolve()
    )


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, section by section."""
    merged = dict(base)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = {**merged[name], **value} if both else value
    return merged
