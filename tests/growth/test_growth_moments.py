"""Optimiser moments through growth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenformer import TokenFormerError, grow
from tokenformer.growth.grow import grow_model
from tokenformer.growth.spec import GrowthSpec
from tokenformer.ops.pattention import NORM_ACTIVATIONS

Moments = dict[str, dict[str, Tensor]]


def draw_tokens() -> Tensor:
    return torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))


def loss(model: nn.Module) -> Tensor:
    tokens = draw_tokens()
    return nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
    return {
        name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def assert_same(found: Moments, expected: Moments) -> None:
    assert found.keys() == expected.keys()
    for name, state in expected.items():
        for key, value in state.items():
            assert torch.equal(found[name][key], value), (name, key)


@pytest.fixture
def trained(make_tokenformer: Callable[..., Any]) -> tuple[Any, torch.optim.AdamW]:
    model = make_tokenformer()
    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    rest = [p for name, p in model.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], lr=1e-2
    )
    train(model, optimizer)
    return model, optimizer


def test_exact_growth_keeps_old_moments_and_new_groups_start_at_step_0(trained) -> None:
    model, optimizer = trained
    before = named_state(model, optimizer)
    larger = grow(model, factor=2.0, optimizer=optimizer)
    assert_same(named_state(larger, optimizer), before)
    new = {name: p for name, p in larger.named_parameters() if name.endswith(".1")}
    assert len(new) == 2 * 10
    assert all(p not in optimizer.state for p in new.values())
    rest, decayed = (group["params"] for group in optimizer.param_groups)
    assert len(rest) == 2
    assert {id(p) for p in decayed} == {id(p) for name, p in larger.named_parameters() if "norm" not in name}
    train(larger, optimizer, steps=1)
    assert {optimizer.state[p]["step"].item() for p in new.values()} == {1.0}
    assert optimizer.state[larger.embedding.weight]["step"] == 4.0


def test_the_old_parameters_move_as_if_nothing_had_grown(trained) -> None:
    """With the new values at zero, old groups get the old gradients, and the old moments do the rest."""
    model, optimizer = trained
    alone, its_optimizer = copy.deepcopy((model, optimizer))
    larger = grow(model, factor=2.0, optimizer=optimizer)
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            if name.endswith("value_tokens.1"):
                parameter.zero_()
    train(larger, optimizer, steps=1)
    train(alone, its_optimizer, steps=1)
    for name, parameter in alone.named_parameters():
        assert not torch.equal(parameter, model.get_parameter(name))
        torch.testing.assert_close(larger.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


def test_random_growth_starts_a_fresh_optimiser(trained) -> None:
    model, optimizer = trained
    larger = grow(model, factor=2.0, init="random", optimizer=optimizer)
    assert not optimizer.state
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(larger.parameters()))
    train(larger, optimizer, steps=1)


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
@pytest.mark.parametrize("r", [2, 3])
def test_moments_of_copies_are_those_of_their_gradients(
    make_tokenformer: Callable[..., Any], kind: str, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients as first moments and their squares as second ones: where the copies carry no noise, what is carried
    over must be what the larger model's own gradients give."""
    monkeypatch.setattr("tokenformer.layers.pattention.COPY_NOISE", 0.0)
    model = make_tokenformer(
        norm_activation=kind, param_token_groups={"qkv": (4, 2), "proj": (5,), "ffn": (12,)}
    ).double()

    def gradients(m: nn.Module) -> Moments:
        m.zero_grad()
        loss(m).backward()
        return {
            name: {"exp_avg": p.grad.clone(), "exp_avg_sq": p.grad**2, "step": torch.tensor(7.0)}
            for name, p in m.named_parameters()
        }

    grown = grow_model(model, GrowthSpec(factor=r, init="copies"))
    carried, expected = grown.moments(gradients(model)), gradients(grown.model)
    assert carried.keys() == expected.keys()
    for name, state in expected.items():
        assert carried[name]["step"] == 7.0
        for key in ("exp_avg", "exp_avg_sq"):
            scale = state[key].abs().max().item()
            torch.testing.assert_close(carried[name][key], state[key], rtol=1e-6, atol=1e-9 * scale)


def test_copies_carry_moments_through_an_optimizer(trained) -> None:
    model, optimizer = trained
    before = named_state(model, optimizer)
    larger = grow(model, ffn=24, init="copies", optimizer=optimizer)
    after = named_state(larger, optimizer)
    assert after.keys() - before.keys() == {
        f"blocks.{block}.ffn.{kind}_tokens.1" for block in (0, 1) for kind in ("key", "value")
    }
    untouched = {name: state for name, state in before.items() if ".ffn." not in name}
    assert_same({name: after[name] for name in untouched}, untouched)
    name = "blocks.0.ffn.key_tokens"
    torch.testing.assert_close(after[f"{name}.1"]["exp_avg"], before[f"{name}.0"]["exp_avg"] / 2)
    torch.testing.assert_close(after[f"{name}.0"]["exp_avg_sq"], before[f"{name}.0"]["exp_avg_sq"] / 4)
    train(larger, optimizer, steps=1)
    assert {state["step"].item() for state in optimizer.state.values()} == {4.0}


def test_moments_by_name_leave_out_what_is_fresh_and_keep_what_is_absent_absent(trained) -> None:
    model, optimizer = trained
    named = named_state(model, optimizer)
    del named["embedding.weight"]
    exact = grow_model(model, GrowthSpec(factor=2)).moments(named)
    assert_same(exact, named)
    assert grow_model(model, GrowthSpec(factor=2, init="random")).moments(named) == {}
    copied = grow_model(model, GrowthSpec(factor=2, init="copies")).moments(named)
    assert "embedding.weight" not in copied
    assert copied["blocks.1.attention.query.value_tokens.1"]["exp_avg"].shape == (6, 16)
    unchanged = named_state(model, optimizer)
    del unchanged["embedding.weight"]
    assert_same(named, unchanged)


def test_amsgrad_and_a_part_of_the_parameters(make_tokenformer: Callable[..., Any]) -> None:
    model = make_tokenformer()
    optimizer = torch.optim.Adam(model.blocks.parameters(), lr=1e-2, amsgrad=True)
    train(model, optimizer)
    largest = optimizer.state[model.blocks[0].ffn.key_tokens[0]]["max_exp_avg_sq"].clone()
    larger = grow(model, factor=2, init="copies", optimizer=optimizer)
    torch.testing.assert_close(
        optimizer.state[larger.blocks[0].ffn.key_tokens[1]]["max_exp_avg_sq"], largest / 4
    )
    assert larger.embedding.weight not in optimizer.state
    train(larger, optimizer, steps=1)


def test_frozen_groups_stay_bit_identical_through_training_with_weight_decay(trained) -> None:
    model, optimizer = trained
    larger = grow(model, factor=2.0, optimizer=optimizer)
    for module in larger.modules():
        if hasattr(module, "freeze"):
            module.freeze(0)
    before = {name: p.clone() for name, p in larger.named_parameters()}
    train(larger, optimizer)
    for name, parameter in larger.named_parameters():
        frozen = name.endswith((".key_tokens.0", ".value_tokens.0"))
        assert torch.equal(parameter, before[name]) == frozen, name


def test_optimisers_of_something_else_are_refused_untouched(trained, make_tokenformer) -> None:
    model, optimizer = trained
    other = make_tokenformer()
    with pytest.raises(TokenFormerError, match="holds parameters that are not the model's"):
        grow(other, factor=2, optimizer=optimizer)
    unknown = torch.optim.RMSprop(model.parameters(), lr=1e-2)
    train(model, unknown, steps=1)
    with pytest.raises(TokenFormerError, match=r"\['square_avg'\] is neither Adam's nor Muon's"):
        grow(model, factor=2, optimizer=unknown)
    assert len(unknown.state) == len(list(model.parameters()))
