"""The ladders for one GPU: sizes, FLOPs, rates, and what their comments say of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenformer.report.inspect_run import describe_recipe
from tokenformer.train.config import load_run_config
from tokenformer.train.ladder import model_configs

RECIPES = Path(__file__).parents[2] / "recipes"

# Recipe -> total PFLOP, and parameters in millions of each stage.
EXPECTED = {
    "ladder-10min": (10, [3.7, 14.3, 56.8]),
    "ladder-1h": (300, [14.5, 56.9, 226.8]),
    "ladder-1day": (16_000, [50.7, 201.7, 805.7]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_sizes_and_compute(name: str) -> None:
    total, sizes = EXPECTED[name]
    facts, _ = describe_recipe(RECIPES / f"{name}.yaml")
    flops = [stage["total_flops"] / 1e15 for stage in facts["stages"]]
    assert flops == pytest.approx([0.1 * total, 0.8 * total, total], rel=0.02)
    config = load_run_config(RECIPES / f"{name}.yaml")
    assert config.model is not None
    models = model_configs(config.model, config.resolve())
    assert [model.num_parameters() / 1e6 for model in models] == pytest.approx(sizes, abs=0.05)


@pytest.mark.parametrize("name", EXPECTED)
def test_growth_is_exact_with_values_of_zero_at_half_the_rate(name: str) -> None:
    first, *grown = load_run_config(RECIPES / f"{name}.yaml").resolve()
    assert first.schedule.name == grown[0].schedule.name == "constant"
    assert (grown[-1].schedule.name, grown[-1].schedule.final_lr_fraction) == ("linear", 0.0)
    for stage in grown:
        assert stage.grow is not None
        assert (stage.grow.init, stage.grow.new_tokens, stage.grow.factor) == ("exact", "zero_values", 4)
        assert stage.optimizer.lr == first.optimizer.lr / 2
        assert stage.optimizer.lr_multipliers == {"embedding": 4}


@pytest.mark.parametrize("name", EXPECTED)
def test_inspect_prints_the_plan(name: str, run_command: Callable[..., Any]) -> None:
    done = run_command("inspect", RECIPES / f"{name}.yaml")
    assert done.code == 0, done.err
    assert "PFLOP in all" in done.out
    (row,) = (line.split() for line in done.out.splitlines() if line.split()[:1] == ["large"])
    assert float(row[-1].replace(",", "")) == pytest.approx(EXPECTED[name][0], rel=0.02)


def test_it_fits_one_gpu() -> None:
    facts, _ = describe_recipe(RECIPES / "ladder-1day.yaml")
    assert max(stage["bytes"]["peak"] for stage in facts["training_memory"]) < 60e9
