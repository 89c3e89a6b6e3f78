"""Recipes: what is read, what is inherited, and what is refused before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tokenformer.errors import TokenFormerError
from tokenformer.train.config import RunConfig, load_run_config, parse_run_config

RECIPE = """
model:
  architecture: tokenformer
  vocab_size: 384
  hidden_size: 32
  num_hidden_layers: 1
  num_attention_heads: 4
  qkv_param_tokens: 16
  proj_param_tokens: 16
  ffn_param_tokens: 64
  max_position_embeddings: 64
data: {path: data/x, sequence_length: 32, batch_tokens: 256}
optimizer: {lr: 3e-4, weight_decay: 0.05}
stages:
- steps: 10
- {tokens: 1000, grow: {factor: 2}, optimizer: {lr: 1e-4}, data: {batch_tokens: 128}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_stage_inherits_what_it_does_not_name(recipe: Path) -> None:
    first, second = load_run_config(recipe).resolve()
    assert (first.optimizer.lr, second.optimizer.lr) == (3e-4, 1e-4)
    assert second.optimizer.weight_decay == 0.05
    assert (second.data.batch_tokens, second.data.sequence_length) == (128, 32)
    assert second.steps == 8  # 1000 tokens in batches of 128, rounded up
    assert second.grow is not None
    assert second.grow.factor == 2


def test_effective_configuration_reads_back(recipe: Path) -> None:
    config = load_run_config(recipe, ["schedule.name=wsd"])
    assert parse_run_config(config.to_yaml(), source="config.yaml") == config


def test_overrides_are_yaml_and_numbers_are_numbers(recipe: Path) -> None:
    config = load_run_config(
        recipe,
        [
            "optimizer.lr=1e-3",
            "stages.0.steps=7",
            "evaluation.every_steps=null",
            "optimizer.betas=[0.8, 0.9]",
        ],
    )
    assert config.optimizer.lr == 1e-3
    assert config.resolve()[0].steps == 7
    assert config.evaluation.every_steps is None
    assert config.optimizer.betas == (0.8, 0.9)


def test_reading_a_recipe_imports_no_torch(recipe: Path) -> None:
    code = (
        "import sys; from tokenformer.train.config import load_run_config; "
        "load_run_config(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(recipe)], check=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: unknown field; did you mean 'lr'?"),
        ("model.hidden_sze=3", "model.hidden_sze: unknown field; did you mean 'hidden_size'?"),
        (
            "stages.1.optimizer.weight_dcay=1",
            "stages.1.optimizer.weight_dcay: unknown field; did you mean 'weight_decay'?",
        ),
        ("stages.1.grow.facto=2", "did you mean 'factor'?"),
        ("stagess=1", "stagess: unknown field; did you mean 'stages'?"),
        (
            "model.architecture=tokenfromer",
            "model.architecture: found 'tokenfromer'; expected 'tokenformer', 'transformer'",
        ),
        ("model.num_attention_heads=5", "num_attention_heads 5 does not divide hidden_size 32"),
        ("model.qkv_param_tokens=0", "model.qkv_param_tokens: found 0"),
        ("data.batch_tokens=100", "batch_tokens 100 is not a multiple of sequence_length 32"),
        ("stages.1.data.batch_tokens=100", "stages.1.data: batch_tokens 100 is not a multiple"),
        ("data.sequence_length=128", "found 128 in stage 0, but the model's max_position_embeddings is 64"),
        ("steps=3", "found steps and stages, expected exactly one of steps, tokens, stages"),
        ("stages.0.tokens=3", "stages.0: found steps and tokens"),
        ("init_from=x", "found model and init_from, expected exactly one"),
        ("stages.0.grow={factor: 2}", "stages.0.grow: the first stage starts from fresh weights"),
        ("stages.1.grow={qkv: 4}", "stages.1.grow: qkv: found 4, but there are 16"),
        ("model.norm_activation=softmax", "init 'exact' is not possible for norm_activation 'softmax'"),
        (
            "stages.1.grow={factor: 1.5, init: copies}",
            "stages.1.grow: qkv: found 24, but init 'copies' needs a whole multiple",
        ),
        ("schedule.name=cos", "schedule.name: found 'cos'"),
        ("optimizer.lr=-1", "optimizer.lr: found -1"),
        ("optimizer.lr_multipliers={'group:x': 2}", "expected a role or 'group:K'"),
        ("parallel.device=tpu", "parallel.device: found 'tpu', expected auto, cpu"),
        ("data.path.x=3", "which is no section"),
        ("stages.7.steps=1", "found '7', expected an index from 0 to 1"),
        ("optimizer", "expected field=value"),
        ("model.tau=[1", "invalid YAML"),
    ],
)
def test_refusals_name_the_field(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(TokenFormerError) as caught:
        load_run_config(recipe, [override])
    assert message in str(caught.value)


def test_all_wrong_fields_are_named_at_once(recipe: Path) -> None:
    with pytest.raises(TokenFormerError) as caught:
        load_run_config(recipe, ["optimizer.lrr=1", "data.sequence_length=none", "seed=-1"])
    text = str(caught.value)
    assert "optimizer.lrr" in text
    assert "data.sequence_length" in text
    assert "seed" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [1", "invalid YAML at line 1"),
        ("", "found nothing, expected a mapping"),
        ("- 1", "found a list, expected a mapping"),
        ("seed: 1\ndata: {}\nseed: 2", "invalid YAML at line 3, column 1: 'seed' stands here a second time"),
        ("data: !!python/object/apply:os.getcwd []", "invalid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(TokenFormerError, match=r"recipe\.yaml") as caught:
        load_run_config(path)
    assert message in str(caught.value)


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(TokenFormerError, match="no such file; expected a recipe"):
        load_run_config(tmp_path / "nothing.yaml")


def test_exact_growth_of_a_transformer_is_refused(recipe: Path) -> None:
    sizes = "vocab_size: 384, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 4"
    model = f"model={{architecture: transformer, {sizes}}}"
    with pytest.raises(TokenFormerError, match="no parameter tokens to grow"):
        load_run_config(recipe, [model])


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    config = load_run_config(path)
    assert isinstance(config, RunConfig)
    assert all(stage.steps > 0 for stage in config.resolve())


def test_recipes_are_found() -> None:
    assert {"small", "continue", "ladder"} <= {path.stem for path in RECIPES}
