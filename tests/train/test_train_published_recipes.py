"""The recipes of the published models: sizes against the published ones, settings, and the table in the docs."""

from pathlib import Path

import pytest

from tokenformer.models.config import DecoderConfig
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.train.config import RunConfig, load_run_config
from tokenformer.train.ladder import model_configs

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in (ROOT / "recipes" / "published").glob("*.yaml")}

# Recipe -> for each stage: the published name, all parameters, steps.
EXPECTED = {
    "pile-150m": [("150M", 151_881_216, 143_000)],
    "pile-450m": [("450M", 454_166_528, 143_000)],
    "pile-900m": [("900M", 903_252_480, 143_000)],
    "pile-1.5b": [("1.5B", 1_587_219_456, 143_000)],
    "pile-pythia-160m": [("160M", 162_322_944, 143_000)],
    "pile-pythia-410m": [("410M", 405_334_016, 143_000)],
    "pile-pythia-1b": [("1B", 1_011_781_632, 143_000)],
    "pile-pythia-1.4b": [("1.4B", 1_414_647_808, 143_000)],
    "openwebtext2-354m": [("354M", 353_503_232, 600_000)],
    "openwebtext2-757m-60k": [("757M", 756_156_416, 60_000)],
    "openwebtext2-757m-120k": [("757M", 756_156_416, 120_000)],
    "openwebtext2-transformer-124m": [("124M", 123_606_528, 600_000)],
    "openwebtext2-transformer-354m": [("354M", 353_601_536, 600_000)],
    "openwebtext2-transformer-757m": [("757M", 756_894_720, 600_000)],
    "openwebtext2-transformer-1.4b": [("1.4B", 1_411_862_528, 600_000)],
    "jax-ladder": [
        ("124M", 123_569_664, 600_000),
        ("354M", 354_190_848, 120_000),
        ("757M", 757_040_640, 120_000),
        ("1.4B", 1_399_948_800, 120_000),
    ],
}


def models_of(run: RunConfig) -> list[DecoderConfig]:
    """The model of each stage; a run that begins from another's model takes it from that recipe."""
    if run.model is not None:
        return model_configs(run.model, run.resolve())
    assert run.init_from is not None
    (initial,) = models_of(load_run_config(RECIPES[Path(run.init_from).name]))
    return model_configs(initial, run.resolve())


def nominal(name: str) -> float:
    return float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]


def test_every_published_model_has_a_recipe() -> None:
    assert set(RECIPES) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_parameters_and_steps(name: str) -> None:
    run = load_run_config(RECIPES[name])
    models, stages = models_of(run), run.resolve()
    found = [(model.num_parameters(), stage.steps) for model, stage in zip(models, stages, strict=True)]
    assert found == [(parameters, steps) for _, parameters, steps in EXPECTED[name]]
    for model, (published, *_) in zip(models, EXPECTED[name], strict=True):
        total = model.num_parameters()
        # 1.5B is the count without the embedding; the other names are all parameters, rounded
        counted = total - model.parameter_counts()["embedding"] if published == "1.5B" else total
        assert counted == pytest.approx(nominal(published), rel=0.02)


@pytest.mark.parametrize("name", EXPECTED)
def test_settings_are_the_published_ones(name: str) -> None:
    run = load_run_config(RECIPES[name])
    pile = name.startswith("pile")
    peak = {"pile-pythia-410m": 3e-4, "pile-pythia-1b": 2.5e-4, "pile-pythia-1.4b": 2e-4}.get(name, 6e-4)
    for model, stage in zip(models_of(run), run.resolve(), strict=True):
        optimizer, schedule, data = stage.optimizer, stage.schedule, stage.data
        assert (optimizer.lr, optimizer.betas, optimizer.eps) == (peak, (0.9, 0.95), 1e-8)
        assert (optimizer.weight_decay, optimizer.grad_clip) == (0.1, 1.0)
        assert (schedule.name, schedule.warmup_fraction, schedule.final_lr_fraction) == ("cosine", 0.01, 0.1)
        assert (data.sequences_per_step, data.sequence_length) == ((1024, 2048) if pile else (512, 1024))
        assert model.max_position_embeddings == data.sequence_length
        assert (model.vocab_size, model.initializer) == (50304, "published")
        if isinstance(model, TokenFormerConfig):
            jax = name == "jax-ladder"
            assert model.tie_word_embeddings
            assert model.norm_activation == ("gelu" if jax else "l2_norm_gelu")
            assert model.gelu_approximate == ("tanh" if jax else "none")
            assert model.rotary_dim == (0 if jax else model.head_dim // 4)
            assert model.logit_scale == pytest.approx(model.hidden_size**-0.5 if jax else 1.0, rel=1e-15)


@pytest.mark.parametrize("name", ["pile-150m", "pile-pythia-160m", "openwebtext2-transformer-124m"])
def test_the_models_have_these_parameters(name: str) -> None:
    (config,) = models_of(load_run_config(RECIPES[name]))
    narrow = config.model_copy(update={"num_hidden_layers": 1, "vocab_size": 128})
    model = build_model(narrow)
    assert sum(parameter.numel() for parameter in model.parameters()) == narrow.num_parameters()


def test_the_table_says_what_the_recipes_say() -> None:
    text = (ROOT / "docs" / "published-models.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    found = [row for row in rows if row[0].startswith("[") and "recipes/published/" in row[0]]
    expected = []
    for name, stages in EXPECTED.items():
        run = load_run_config(RECIPES[name])
        link = f"[{name}](../recipes/published/{name}.yaml)"
        for config, stage, (published, *_) in zip(models_of(run), run.resolve(), stages, strict=True):
            shape = f"{config.num_hidden_layers} / {config.hidden_size} / {config.num_attention_heads}"
            tokens = "none"
            if isinstance(config, TokenFormerConfig):
                tokens = f"{config.qkv_param_tokens} / {config.ffn_param_tokens}"
            without = config.num_parameters() - config.parameter_counts()["embedding"]
            cells = [link, published, f"{config.num_parameters():,}", f"{without:,}", shape, tokens]
            expected.append([*cells, f"{stage.steps:,}"])
    assert found == expected


def test_the_readme_names_every_recipe_and_count() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Published models") :].split("## More")[0]
    for name, stages in EXPECTED.items():
        assert f"`{name}`" in table or f"`-{name.rsplit('-', 1)[1]}`" in table, name
        for _, parameters, _ in stages:
            assert f"{parameters:,}" in table, (name, parameters)
