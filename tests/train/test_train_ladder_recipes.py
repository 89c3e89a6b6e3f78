"""The ladders for one GPU: sizes, FLOPs, rates, and what their comments say of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenformer.report.inspect_run import describe_recipe
from tokenformer.train.config import load_run_config
from tokenformer.train.ladder import model_configs
from tokenformer.train.schedule import lr_factor

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
    assert flops == pytest.approx([0.2 * total, 0.9 * total, total], rel=0.02)
    config = load_run_config(RECIPES / f"{name}.yaml")
    assert config.model is not None
    models = model_configs(config.model, config.resolve())
    assert [model.num_parameters() / 1e6 for model in models] == pytest.approx(sizes, abs=0.05)


@pytest.mark.parametrize("name", EXPECTED)
def test_growth_is_exact_and_the_rate_falls_once_across_it(name: str) -> None:
    total, _ = EXPECTED[name]
    stages = load_run_config(RECIPES / f"{name}.yaml").resolve()
    for stage in stages[1:]:
        assert stage.grow is not None
        assert (stage.grow.init, stage.grow.new_tokens, stage.grow.factor) == ("exact", "zero_keys", 4)
        assert stage.optimizer.lr_multipliers == {"embedding": 4}
    facts, _ = describe_recipe(RECIPES / f"{name}.yaml")
    begin, peak = 0.0, stages[0].optimizer.lr
    for stage, planned in zip(stages, facts["stages"], strict=True):
        end, steps = planned["total_flops"] / 1e15, planned["steps"]
        for step in range(stage.schedule.warmup_steps or 0, steps, steps // 50):
            share = (begin + (end - begin) * (step + 1) / steps) / total
            rate = stage.optimizer.lr * lr_factor(stage.schedule, step, steps)
            assert rate == pytest.approx(peak * min(1.0, 4 * (1 - share)), abs=0.05 * peak)
        begin = end


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
