"""The plan of a comparison: one YAML that names models, runs, budgets, seeds and what is varied. No torch here."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tokenformer.errors import TokenFormerError
from tokenformer.growth.spec import GrowthSpec
from tokenformer.train.yaml_source import read_yaml
from tokenformer.validation import StrictModel, validate

Values = dict[str, Any]


Trial = Literal["qk_norm", "out_norm", "affine_norms"]


class Growth(StrictModel):
    """How a run begins from the end of its parent's.

    One of ``tokens`` (a TokenFormer: more parameter tokens), ``widen`` and ``deepen`` (a Transformer: the factor; see
    :mod:`tokenformer.growth.transformer`), or none of them: the same model goes on. ``moments``: whether the optimiser
    keeps its state. Of the new tokens of a TokenFormer, ``key_std`` replaces the keys by normal ones, in units of
    1/sqrt(d) (0: zero keys; then with a changed tau), and ``value_gain`` multiplies the values.
    """

    tokens: GrowthSpec | None = None
    widen: int | None = None
    noise: float = 0.5
    deepen: int | None = None
    order: Literal["stack", "interleave"] = "stack"
    identity: bool = False
    moments: Literal["keep", "reset"] = "keep"
    key_std: float | None = None
    value_gain: float = 1.0

    @property
    def only_goes_on(self) -> bool:
        """Whether the child is its parent, model and moments, under another schedule."""
        return self == Growth()


class Run(StrictModel):
    """One run of a comparison: ``config`` are the sections of its :class:`~tokenformer.train.config.RunConfig`.

    ``flops``: total at its end, those of the parents included. ``scales`` multiply fresh weights: ``keys``,
    ``values``, ``embedding``, or of one role ``ffn-values``, ``qkv`` (a Transformer's matrices). ``watch``: validate
    every 10 steps on one fixed batch, to see what growth does at once. ``trials``: changes of the architecture that
    are only tried here (:mod:`benchmarks.growth.trials`).
    """

    name: str
    side: str
    group: str
    seed: int
    round: int = 0
    model: Values | None = None
    scales: dict[str, float] = Field(default_factory=dict)
    parent: str | None = None
    growth: Growth = Growth()
    flops: float
    watch: bool = False
    trials: tuple[Trial, ...] = ()
    config: Values

    @model_validator(mode="after")
    def _check_start(self) -> Run:
        if (self.model is None) == (self.parent is None):
            raise ValueError("expected exactly one of model and parent")
        return self

    @property
    def id(self) -> str:
        """Name and seed: one of its kind in a plan."""
        return f"{self.name}#{self.seed}"

    @property
    def parent_id(self) -> str | None:
        """The run whose end this one begins from; it has the same seed."""
        return None if self.parent is None else f"{self.parent}#{self.seed}"

    @property
    def directory(self) -> str:
        """A name for files."""
        return re.sub(r"[^\w.=-]+", "-", self.id)


class Entry(StrictModel):
    """Runs as written: ``set`` and ``grid`` take dotted names of a run's fields (``config.`` may be left out of its
    sections': ``optimizer.lr``); every combination of the lists of ``grid`` is a run for each of ``seeds``."""

    name: str
    side: str | None = None
    group: str = "runs"
    round: int = 0
    model: str | None = None
    parent: str | None = None
    flops: float | None = None
    watch: bool = False
    seeds: tuple[int, ...] = (0,)
    set: Values = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)


class Plan(StrictModel):
    """``config``: sections that all runs share. ``curve_points``: validations along a run, of ``curve_tokens`` tokens;
    at its end ``scored_tokens`` of validation and of test. Runs are started by round, then seed, then as written.
    ``speed``: FLOP/s of a whole GPU, and ``overhead``: seconds of a run besides its steps; both as long as none was
    measured."""

    config: Values
    models: dict[str, Values]
    curve_points: int = 8
    curve_tokens: int = 65536
    scored_tokens: int = 524288
    speed: float = 1e15
    overhead: float = 0.0
    runs: tuple[Entry, ...]


def load_plan(path: Path | str) -> Plan:
    """Read and validate a plan.

    Raises:
        TokenFormerError: a missing or invalid file.
    """
    return validate(Plan, read_yaml(path, "a plan of runs"), source=str(path))


def expand(plan: Plan) -> list[Run]:
    """Every run of the plan, in the order in which they are started.

    Raises:
        TokenFormerError: an unknown model or parent, a name that stands twice.
    """
    runs = [run for entry in plan.runs for run in _expand_entry(plan, entry)]
    known: dict[str, Run] = {}
    for run in runs:
        if run.id in known:
            raise TokenFormerError(f"runs: '{run.id}' stands in the plan twice")
        known[run.id] = run
    for run in runs:
        if run.parent_id is not None and run.parent_id not in known:
            raise TokenFormerError(f"runs: '{run.id}': its parent '{run.parent_id}' is not in the plan")
    seeds = sorted({run.seed for run in runs})
    return sorted(runs, key=lambda run: (run.round, seeds.index(run.seed)))  # stable: then as written


def _expand_entry(plan: Plan, entry: Entry) -> list[Run]:
    runs = []
    for chosen in itertools.product(*entry.grid.values()):
        varied = dict(zip(entry.grid, chosen, strict=True))
        name = entry.name
        if varied:
            name += "/" + ",".join(
                f"{key.rpartition('.')[2]}={_short(value)}" for key, value in varied.items()
            )
        values = _values(plan, entry, entry.set | varied)
        for seed in entry.seeds:
            fields = values | {"name": name, "side": entry.side or entry.name, "seed": seed}
            runs.append(validate(Run, fields, source=f"runs: '{name}'"))
    return runs


def _values(plan: Plan, entry: Entry, changes: Values) -> Values:
    model = changes.get("model", entry.model)
    if model is not None and model not in plan.models:
        raise TokenFormerError(
            f"runs: '{entry.name}': unknown model '{model}', expected one of {[*plan.models]}"
        )
    values: Values = {
        "group": entry.group,
        "round": entry.round,
        "watch": entry.watch,
        "config": _copied(plan.config),
        **({"model": _copied(plan.models[model])} if model is not None else {}),
        **({"parent": entry.parent} if entry.parent is not None else {}),
        **({"flops": entry.flops} if entry.flops is not None else {}),
    }
    for key, value in changes.items():
        if key != "model":
            _put(values, key if key.split(".")[0] in Run.model_fields else f"config.{key}", value)
    return values


def _put(values: Values, dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for name in path:
        values = values.setdefault(name, {})
    values[last] = _copied(value) if isinstance(value, dict) else value


def _copied(values: Values) -> Values:
    return {name: _copied(value) if isinstance(value, dict) else value for name, value in values.items()}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return re.sub(r"[{}' ]", "", str(value))
