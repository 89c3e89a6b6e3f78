"""Problems of a configuration, in its own words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from tokenformer import TokenFormerError
from tokenformer.validation import Float, Int, StrictModel, known_fields, nearest, validate


class Optimizer(StrictModel):
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


class Circle(StrictModel):
    shape: Literal["circle"] = "circle"
    radius: float = 1.0


class Square(StrictModel):
    shape: Literal["square"] = "square"
    side: float = 1.0

    @model_validator(mode="after")
    def _check(self) -> Square:
        if self.side > 10:
            raise ValueError(f"side {self.side} does not fit")
        return self


class Stage(StrictModel):
    steps: int
    optimizer: Optimizer | None = None


class Run(StrictModel):
    model: Annotated[Circle | Square, Field(discriminator="shape")] = Circle()
    optimizer: Optimizer = Optimizer()
    stages: tuple[Stage, ...] = ()
    name: str | None = None
    ways: Mapping[Literal["up", "down"], int] | None = None


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({"optimiser": {}}, ["file: optimiser: unknown field; did you mean 'optimizer'?"]),
        ({"optimizer": {"lrr": 1}}, ["file: optimizer.lrr: unknown field; did you mean 'lr'?"]),
        (
            {"stages": [{"steps": 1}, {"steps": 2, "optimizer": {"beta": 1}}]},
            ["file: stages.1.optimizer.beta: unknown field; did you mean 'betas'?"],
        ),
        (
            {"stages": [{"step": 1}]},
            [
                "file: stages.0.steps: missing, but required",
                "file: stages.0.step: unknown field; did you mean 'steps'?",
            ],
        ),
        (
            {"model": {"shape": "square", "radius": 2}},
            ["file: model.radius: unknown field; known: shape, side"],
        ),
        (
            {"model": {"shape": "circle", "radios": 2}},
            ["file: model.radios: unknown field; did you mean 'radius'?"],
        ),
        ({"model": {"shape": "circle", "circle": 2}}, ["file: model.circle: unknown field"]),
        ({"model": {"radius": 2}}, ["file: model.shape: missing, but required"]),
        ({"model": {"shape": "line"}}, ["file: model.shape: found 'line'; expected 'circle', 'square'"]),
        (
            {"model": {"shape": "square", "side": "x"}},
            ["file: model.side: found 'x'; input should be a valid number"],
        ),
        ({"model": {"shape": "square", "side": 11}}, ["file: model: side 11.0 does not fit"]),
        ({"optimizer": {"lr": 0}}, ["file: optimizer.lr: found 0; input should be greater than 0"]),
        (
            {"optimizer": {"lr": float("inf")}},
            ["file: optimizer.lr: found inf; input should be a finite number"],
        ),
        ({"optimizer": {"betas": [0.9]}}, ["file: optimizer.betas.1: missing, but required"]),
        ({"ways": {"upp": 1}}, ["file: ways.upp: found 'upp'; input should be 'up' or 'down'"]),
        ({"optimizer": 3}, ["file: optimizer: found 3; input should be a valid"]),
        (
            {"zzz": 1, "optimizer": {"lr": -1}},
            ["file: optimizer.lr: found -1", "file: zzz: unknown field; known: model"],
        ),
    ],
)
def test_each_problem_is_one_line_with_its_place(values: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(TokenFormerError) as caught:
        validate(Run, values, source="file")
    found = str(caught.value).splitlines()
    assert len(found) == len(lines)
    for line, opening in zip(found, lines, strict=True):
        assert line.startswith(opening)


def test_valid_values_make_an_immutable_model() -> None:
    run = validate(Run, {"model": {"shape": "square", "side": 2}, "stages": [{"steps": 3}]}, source="file")
    assert run.model == Square(side=2.0)
    assert run.stages == (Stage(steps=3),)
    with pytest.raises(ValueError, match="frozen"):
        run.name = "other"


def test_nearest() -> None:
    assert nearest("hidden", ["hidden_size", "vocab_size"]) == "; did you mean 'hidden_size'?"
    assert nearest("qqq", ["b", "a"]) == "; known: a, b"
    assert nearest("qqq", []) == ""


def test_known_fields_of_nested_places() -> None:
    assert known_fields(Run, ()) == ["model", "name", "optimizer", "stages", "ways"]
    assert known_fields(Run, ("stages", 0, "optimizer")) == ["betas", "lr"]
    assert known_fields(Run, ("model", "square")) == ["shape", "side"]
    assert known_fields(Run, ("model",)) == ["radius", "shape", "side"]


class _Numbers(StrictModel):
    steps: Annotated[Int, Field(gt=0)] | None = None
    lr: Annotated[Float, Field(gt=0)] = 1.0
    name: str = ""
    flag: bool = False


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"steps": "12"}, "recipe: steps: found '12', expected a number"),
        ({"steps": True}, "recipe: steps: found True, expected a number"),
        ({"lr": "fast"}, "recipe: lr: found 'fast', expected a number"),
        ({"lr": "3e-4", "name": "12"}, "recipe: lr: found '3e-4', expected a number"),
    ],
)
def test_text_is_no_number(values: dict[str, object], line: str) -> None:
    with pytest.raises(TokenFormerError) as caught:
        validate(_Numbers, values, source="recipe")
    assert str(caught.value) == line


def test_whole_floats_are_integers() -> None:
    numbers = validate(_Numbers, {"steps": 1e3, "lr": 1, "name": "12", "flag": True}, source="recipe")
    assert numbers.steps == 1000
    assert numbers.lr == 1.0
