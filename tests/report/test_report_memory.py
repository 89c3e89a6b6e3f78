"""What ``inspect`` predicts of training: of a recipe as it says, of a model as the options say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenformer.models.directory import save_model

RECIPES = Path(__file__).parents[2] / "recipes" / "published"


def test_recipe(run_command: Callable[..., Any]) -> None:
    done = run_command("inspect", RECIPES / "pile-450m.yaml", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["kind"] == "recipe"
    (stage,) = facts["training_memory"]
    assert (stage["setup"]["micro_batch_size"], stage["setup"]["dtype"]) == (16, "bfloat16")
    parts = stage["bytes"]
    assert parts["weights"] == 4 * facts["model"]["parameters"]["total"]
    assert parts["peak"] > parts["weights"] + parts["moments"] + parts["activations"]


def test_recipe_on_several_devices(run_command: Callable[..., Any], tmp_path: Path) -> None:
    def inspect(*options: object, code: int = 0, **parallel: Any) -> Any:
        recipe = yaml.safe_load((RECIPES / "pile-450m.yaml").read_text())
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"parallel": parallel}))
        done = run_command("inspect", tmp_path / "recipe.yaml", "--json", *options)
        assert done.code == code, done.err
        return done.err if code else json.loads(done.out)["training_memory"][0]

    one, eight = inspect(), inspect("--devices", 8)
    assert (one["setup"]["shard"], eight["setup"]["shard"]) == (1, 8)
    assert eight["bytes"]["moments"] == pytest.approx(one["bytes"]["moments"] / 8, rel=1e-6)
    kept = inspect("--devices", 8, reshard_after_forward=False)
    assert kept["bytes"]["workspace"] > eight["bytes"]["workspace"]
    split = inspect(tensor=2, replicate=2)  # four devices
    assert (split["setup"]["shard"], split["setup"]["tensor"]) == (1, 2)
    assert split["bytes"]["weights"] < one["bytes"]["weights"]
    assert "does not divide 3 processes" in inspect("--devices", 3, code=2, replicate=2)
    assert "parallel.tensor: 7 ranks do not divide" in inspect(code=2, tensor=7)


def test_model_with_options(
    run_command: Callable[..., Any], make_tokenformer: Callable[..., Any], tmp_path: Path
) -> None:
    save_model(make_tokenformer(), tmp_path / "model")
    one = json.loads(run_command("inspect", tmp_path / "model", "--json").out)["training_memory"][0]
    options = (
        "--micro-batch-size",
        8,
        "--activation-checkpointing",
        "full",
        "--devices",
        2,
        "--optimizer",
        "muon",
    )
    other = json.loads(run_command("inspect", tmp_path / "model", "--json", *options).out)["training_memory"][
        0
    ]
    assert one["setup"]["micro_batch_size"] == 1
    assert one["setup"]["sequence_length"] == 64
    assert other["setup"]["activation_checkpointing"] == "full"
    assert (other["setup"]["recompute"], other["setup"]["recomputed_blocks"]) == ("block", 2)
    assert (one["setup"]["recompute"], one["setup"]["recomputed_blocks"]) == ("nothing", 0)
    scores = json.loads(
        run_command("inspect", tmp_path / "model", "--json", *options, "--recompute", "scores").out
    )
    assert scores["training_memory"][0]["setup"]["recompute"] == "scores"
    assert scores["training_memory"][0]["bytes"]["activations"] > other["bytes"]["activations"]
    assert other["bytes"]["moments"] < one["bytes"]["moments"] / 2
    text = run_command("inspect", tmp_path / "model", *options).out
    assert "Memory of training on one device (predicted)" in text


def test_other_yaml_is_explained(run_command: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: 1\n")
    done = run_command("inspect", tmp_path / "x.yaml")
    assert done.code == 2
    assert "a: unknown field" in done.err
