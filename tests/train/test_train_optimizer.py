"""Which parameters decay, at which rate, and which stand still; moments by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenformer.errors import TokenFormerError
from tokenformer.growth.grow import grow_model
from tokenformer.growth.spec import GrowthSpec
from tokenformer.models.base import LanguageModel
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.train.config import RunConfig
from tokenformer.train.optimizer import (
    build_optimizer,
    check_roles_and_groups,
    load_named_state,
    named_state,
    set_learning_rate,
)
from tokenformer.train.run import train
from tokenformer.train.sections import OptimizerConfig

MakeConfig = Callable[..., RunConfig]


def small_model(*, grown: bool = False) -> LanguageModel:
    config = TokenFormerConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        qkv_param_tokens=4,
        proj_param_tokens=4,
        ffn_param_tokens=8,
    )
    model = build_model(config)
    return grow_model(model, GrowthSpec(factor=2)).model if grown else model


def take_steps(model: LanguageModel, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    tokens = torch.arange(24).reshape(2, 12)
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens).logits.square().mean().backward()
        optimizer.step()


def settings_by_name(
    model: LanguageModel, optimizer: torch.optim.Optimizer
) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_decay_on_all_but_norms() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1))
    decayed = {name for name, (decay, _) in settings_by_name(model, optimizer).items() if decay == 0.1}
    assert {name for name, _ in model.named_parameters()} - decayed == {"norm.weight", "norm.bias"}


def test_transformer_biases_and_norms_do_not_decay() -> None:
    config = TransformerConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, use_bias=True
    )
    model = build_model(config)
    settings = settings_by_name(model, build_optimizer(model, OptimizerConfig()))
    for name, parameter in model.named_parameters():
        assert settings[name][0] == (0.1 if parameter.ndim >= 2 else 0.0), name


def test_multipliers_of_role_and_group_combine() -> None:
    model = small_model(grown=True)
    config = OptimizerConfig(lr_multipliers={"ffn": 0.5, "group:1": 4.0})
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.01)
    rates = {name: rate for name, (_, rate) in settings_by_name(model, optimizer).items()}
    assert rates["embedding.weight"] == 0.01
    assert rates["blocks.0.ffn.key_tokens.0"] == 0.005
    assert rates["blocks.0.attention.query.key_tokens.1"] == 0.04
    assert rates["blocks.0.ffn.value_tokens.1"] == 0.02


def test_frozen_parameters_stand_still_and_get_no_gradient() -> None:
    model = small_model(grown=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(
        model, OptimizerConfig(lr=0.1, frozen_groups=(0,), frozen_roles=("embedding",))
    )
    take_steps(model, optimizer)
    for name, parameter in model.named_parameters():
        frozen = name == "embedding.weight" or name.endswith("tokens.0")
        assert torch.equal(parameter, before[name]) == frozen, name
        assert (parameter.grad is None) == frozen, name


def test_named_state_round_trip_continues_exactly() -> None:
    one = small_model()
    optimizer = build_optimizer(one, OptimizerConfig(lr=0.1))
    take_steps(one, optimizer, 3)
    two = small_model()
    two.load_state_dict(one.state_dict())
    other = build_optimizer(two, OptimizerConfig(lr=0.1))
    load_named_state(two, other, named_state(one, optimizer))
    take_steps(one, optimizer, 2)
    take_steps(two, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_moments_of_frozen_parameters_are_kept_for_later() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1))
    take_steps(model, optimizer)
    moments = {
        name: {k: v.clone() for k, v in entry.items()}
        for name, entry in named_state(model, optimizer).items()
    }
    frozen = build_optimizer(model, OptimizerConfig(lr=0.1, frozen_roles=("ffn",)))
    load_named_state(model, frozen, moments)
    take_steps(model, frozen)
    after = named_state(model, frozen)
    assert after.keys() == moments.keys()
    assert torch.equal(
        after["blocks.0.ffn.key_tokens.0"]["exp_avg"], moments["blocks.0.ffn.key_tokens.0"]["exp_avg"]
    )
    assert after["blocks.0.ffn.key_tokens.0"]["step"] == 2
    assert after["embedding.weight"]["step"] == 4


def test_loading_refuses_what_is_not_the_models() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimizerConfig())
    take_steps(model, optimizer)
    moments = named_state(model, optimizer)
    with pytest.raises(TokenFormerError, match="no such parameter"):
        load_named_state(model, optimizer, {"blocks.9.x": moments["norm.weight"]})
    with pytest.raises(TokenFormerError, match=r"norm.weight: exp_avg: found \(128, 16\), expected \(16,\)"):
        load_named_state(model, optimizer, {"norm.weight": moments["embedding.weight"]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"lr_multipliers": {"qvk": 2.0}},
            "lr_multipliers: 'qvk' is no role of this model; did you mean 'qkv'?",
        ),
        ({"frozen_roles": ["mlp"]}, "frozen_roles: 'mlp' is no role"),
        ({"frozen_groups": [1]}, "frozen_groups: 1: expected a group from 0 to 0"),
        ({"lr_multipliers": {"group:2": 2.0}}, "lr_multipliers: 'group:2': expected a group from 0 to 0"),
    ],
)
def test_unknown_roles_and_groups_are_refused(values: dict[str, object], message: str) -> None:
    config = OptimizerConfig.model_validate(values)
    with pytest.raises(TokenFormerError) as caught:
        check_roles_and_groups(config, small_model(), 1, "optimizer")
    assert message in str(caught.value)


def test_nothing_to_train_is_refused() -> None:
    roles = ("embedding", "norm", "qkv", "proj", "ffn")
    with pytest.raises(TokenFormerError, match="nothing to train"):
        build_optimizer(small_model(), OptimizerConfig(frozen_roles=roles))


@pytest.mark.parametrize(
    "frozen",
    [
        {"frozen_groups": (0,), "frozen_roles": ("embedding", "norm")},
        {"frozen_roles": ("embedding", "norm", "qkv", "proj", "ffn")},
    ],
)
def test_a_run_that_trains_nothing_is_refused_before_it_starts(
    frozen: dict[str, Any], make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(optimizer=frozen)
    with pytest.raises(TokenFormerError, match="leave nothing to train"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_beyond_the_memory_is_refused_before_it_is_built(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config("model.ffn_param_tokens=100000000000000")
    with pytest.raises(TokenFormerError, match=r"model: training .* parameters takes at least .* GiB"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
