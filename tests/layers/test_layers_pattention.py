"""The Pattention layer as a module in anyone's network, and the life of its groups of tokens."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenformer import Pattention, TokenFormerError
from tokenformer.layers.pattention import TokenInit, project_together
from tokenformer.ops.pattention import NORM_ACTIVATIONS

EXACT_KINDS = ("gelu", "l2_norm_gelu", "gelu_l2_norm")


def make(groups: Any = 7, *, seed: int = 0, **options: Any) -> Pattention:
    return Pattention(5, 3, groups, generator=torch.Generator().manual_seed(seed), **options)


def draw_x(*shape: int) -> Tensor:
    return torch.randn(*shape, 5, generator=torch.Generator().manual_seed(1))


def train_one_step(layer: nn.Module) -> None:
    optimizer = torch.optim.AdamW((p for p in layer.parameters() if p.requires_grad), lr=1e-2)
    layer(draw_x(20)).square().sum().backward()
    optimizer.step()
    layer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
def test_learns_inside_a_sequential(kind: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(4, 8), Pattention(8, 6, 16, norm_activation=kind), nn.LayerNorm(6), nn.Linear(6, 1)
    )
    x = torch.randn(64, 4)
    y = (x[:, :1] * x[:, 1:2]).sin()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (network(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3, 2), (0,)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer, x = make(), draw_x(*shape)
    out = layer(x)
    assert out.shape == (*shape, 3)
    if out.numel():
        torch.testing.assert_close(out.reshape(-1, 3)[0], layer(x.reshape(-1, 5)[0]))


def test_state_names_its_groups_and_goes_through_a_file_without_pickled_code() -> None:
    layer = make((4, 2))
    assert list(layer.state_dict()) == ["key_tokens.0", "key_tokens.1", "value_tokens.0", "value_tokens.1"]
    assert [tuple(t.shape) for t in layer.state_dict().values()] == [(4, 5), (2, 5), (4, 3), (2, 3)]
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make((4, 2), seed=9)
    assert not torch.equal(other(draw_x(2)), layer(draw_x(2)))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(draw_x(2)), layer(draw_x(2)))


def test_deepcopy_shares_nothing() -> None:
    layer = make((4, 2))
    layer.freeze(0)
    other = copy.deepcopy(layer)
    assert [p.requires_grad for p in other.key_tokens] == [False, True]
    expected = layer(draw_x(2))
    train_one_step(other)
    other.grow(9)
    assert torch.equal(layer(draw_x(2)), expected)
    assert layer.groups == (4, 2)


def test_defaults_and_description() -> None:
    layer = make((4, 3))
    assert (layer.tau, layer.num_param_tokens, layer.groups) == (7.0, 7, (4, 3))
    assert "5, 3, tokens=4 + 3, gelu, tau=7" in repr(layer)
    assert make(tau=2.5).tau == 2.5
    assert layer.tau == 7.0
    assert layer.bfloat16().tau == 7.0


def test_fresh_tokens_are_drawn_as_asked_and_from_the_generator_alone() -> None:
    def draw(init: TokenInit | None) -> Pattention:
        return Pattention(64, 32, (300, 100), init=init, generator=torch.Generator().manual_seed(0))

    layer = draw(None)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), draw(None).parameters(), strict=True))
    assert torch.cat(list(layer.key_tokens)).std().item() == pytest.approx(1 / 8, rel=0.03)
    assert torch.cat(list(layer.value_tokens)).std().item() == pytest.approx(1 / 20, rel=0.03)
    layer = draw(TokenInit(key_std=0.3, value_std=0.7, scale_values=False))
    assert layer.key_tokens[1].std().item() == pytest.approx(0.3, rel=0.03)
    assert layer.value_tokens[0].std().item() == pytest.approx(0.7, rel=0.03)


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_a_fresh_exact_group_changes_no_bit_and_its_removal_gives_the_same_bits_back(kind: str) -> None:
    layer = make(norm_activation=kind)
    before, state = layer(draw_x(3, 40)), {name: t.clone() for name, t in layer.state_dict().items()}
    layer.grow(12)
    assert layer.groups == (7, 5)
    assert layer.tau == 7
    assert torch.equal(layer(draw_x(3, 40)), before)
    assert layer.value_tokens[1].abs().min() > 0
    layer.remove(1)
    assert layer.groups == (7,)
    assert torch.equal(layer(draw_x(3, 40)), before)
    assert all(torch.equal(state[name], t) for name, t in layer.state_dict().items())


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_gradients_reach_new_keys_at_once(kind: str) -> None:
    layer = make(norm_activation=kind)
    layer.grow(12)
    layer(draw_x(8)).square().sum().backward()
    assert layer.key_tokens[1].grad.abs().min() > 0
    train_one_step(layer)
    layer(draw_x(8)).square().sum().backward()
    assert layer.value_tokens[1].grad.abs().min() > 0


def test_values_of_zero_change_no_bit_and_learn_before_their_keys() -> None:
    layer = make()
    before = layer(draw_x(3, 40))
    layer.grow(12, generator=torch.Generator().manual_seed(2), new_tokens="zero_values")
    assert (layer.groups, layer.tau) == ((7, 5), 7)
    assert layer.key_tokens[1].std().item() == pytest.approx(layer.init.key_std, rel=0.4)
    assert torch.equal(layer(draw_x(3, 40)), before)
    layer(draw_x(8)).square().sum().backward()
    assert layer.value_tokens[1].grad.abs().min() > 0
    assert torch.equal(layer.key_tokens[1].grad, torch.zeros(5, 5))
    train_one_step(layer)
    layer(draw_x(8)).square().sum().backward()
    assert layer.key_tokens[1].grad.abs().min() > 0


@pytest.mark.parametrize("kind", [kind for kind in NORM_ACTIVATIONS if kind != "gelu"])
def test_values_of_zero_are_refused_where_they_would_move_the_function(kind: str) -> None:
    layer = make(norm_activation=kind)
    with pytest.raises(TokenFormerError, match=r"init 'exact' is not possible|join its norm"):
        layer.grow(12, new_tokens="zero_values")
    assert layer.groups == (7,)
    moved = make(norm_activation=kind)
    moved.append(torch.ones(5, 5), torch.zeros(5, 3))  # as zero_values would, with tau that stays
    assert (moved(draw_x(8)) - layer(draw_x(8))).abs().max() > 1e-3


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
@pytest.mark.parametrize("r", [2, 3])
def test_copies_keep_the_function_and_part_in_training(kind: str, r: int) -> None:
    layer = make((4, 3), norm_activation=kind, tau=5.0)
    before = layer(draw_x(30))
    layer.grow(7 * r, "copies", torch.Generator().manual_seed(2))
    assert layer.groups == (4, 3, 4 * (r - 1), 3 * (r - 1))
    assert layer.tau == 5.0 * r
    torch.testing.assert_close(layer(draw_x(30)), before, rtol=1e-5, atol=2e-6)
    assert torch.equal(layer.key_tokens[0], layer.key_tokens[2][:4])
    for _ in range(20):
        train_one_step(layer)
    assert (layer.key_tokens[0] - layer.key_tokens[2][:4]).norm() > 0.01


def test_copies_without_noise_would_never_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenformer.layers.pattention.COPY_NOISE", 0.0)
    layer = make(4)
    layer.grow(8, "copies")
    for _ in range(20):
        train_one_step(layer)
    torch.testing.assert_close(layer.key_tokens[0], layer.key_tokens[1])
    torch.testing.assert_close(layer.value_tokens[0], layer.value_tokens[1])


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
def test_random_growth_moves_the_function_and_sets_tau_to_n(kind: str) -> None:
    layer = make(norm_activation=kind)
    before = layer(draw_x(30))
    layer.grow(12, "random", torch.Generator().manual_seed(2))
    assert layer.tau == 12
    assert (layer(draw_x(30)) - before).abs().max() > 0.01
    assert layer.key_tokens[1].std() > 0.1


def test_growth_to_the_same_number_is_no_growth() -> None:
    layer = make()
    layer.grow(7)
    layer.grow(7, "copies")
    assert layer.groups == (7,)


def test_new_groups_have_the_dtype_and_device_of_the_old() -> None:
    layer = make().bfloat16()
    layer.grow(9)
    layer.grow(18, "copies")
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


def test_a_frozen_group_stays_bit_identical_through_training_with_weight_decay() -> None:
    layer = make((4, 3))
    layer.freeze(0)
    frozen = [t.clone() for t in (layer.key_tokens[0], layer.value_tokens[0])]
    trained = layer.key_tokens[1].clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.5)  # the frozen group included
    for _ in range(3):
        optimizer.zero_grad()
        layer(draw_x(20)).square().sum().backward()
        optimizer.step()
    assert layer.key_tokens[0].grad is None
    assert torch.equal(layer.key_tokens[0], frozen[0])
    assert torch.equal(layer.value_tokens[0], frozen[1])
    assert not torch.equal(layer.key_tokens[1], trained)
    layer.unfreeze(0)
    train_one_step(layer)
    assert not torch.equal(layer.key_tokens[0], frozen[0])


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
def test_consolidate_keeps_the_function(kind: str) -> None:
    layer = make((4, 3), norm_activation=kind)
    layer.grow(14, "copies")
    before, tau = layer(draw_x(30)), layer.tau
    layer.consolidate()
    assert layer.groups == (14,)
    assert layer.tau == tau
    torch.testing.assert_close(layer(draw_x(30)), before, rtol=1e-6, atol=1e-6)
    train_one_step(layer)


def test_consolidate_keeps_frozen_frozen_and_refuses_a_mixture() -> None:
    layer = make((4, 3))
    layer.freeze(1)
    with pytest.raises(TokenFormerError, match="some groups are frozen and others not"):
        layer.consolidate()
    layer.freeze(0)
    layer.consolidate()
    assert not any(p.requires_grad for p in layer.parameters())


def test_removing_an_older_group_moves_the_later_ones_up() -> None:
    layer = make((4, 2, 1))
    last = layer.key_tokens[2]
    layer.remove(0)
    assert layer.groups == (2, 1)
    assert layer.key_tokens[1] is last
    assert layer.tau == 7
    assert list(layer.state_dict()) == ["key_tokens.0", "key_tokens.1", "value_tokens.0", "value_tokens.1"]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda layer: layer.grow(6), "found 6, but there are 7 parameter tokens already; growth only adds"),
        (
            lambda layer: layer.grow(15, "copies"),
            "found 15, but init 'copies' needs a whole multiple of the 7",
        ),
        (lambda layer: layer.remove(0), "the only group"),
        (lambda layer: layer.remove(1), "found 1, but this layer has groups 0 to 0"),
        (lambda layer: layer.freeze(-1), "found -1, but this layer has groups 0 to 0"),
        (lambda layer: layer.unfreeze(3), "found 3"),
    ],
)
def test_refusals(action: Any, message: str) -> None:
    layer = make()
    with pytest.raises(TokenFormerError, match=message):
        action(layer)
    assert layer.groups == (7,)


def test_softmax_refuses_exact_growth_and_names_copies() -> None:
    layer = make(norm_activation="softmax")
    with pytest.raises(
        TokenFormerError, match=r"not possible for norm_activation 'softmax'.*use init 'copies'"
    ):
        layer.grow(14)
    layer.grow(14, "copies")


def test_copies_refuse_frozen_values() -> None:
    layer = make((4, 3))
    layer.freeze(0)
    with pytest.raises(TokenFormerError, match="a group is frozen"):
        layer.grow(14, "copies")
    layer.grow(7, "copies")  # nothing to divide


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 3, 4), {}, "sizes must be positive, found in_features 0"),
        ((3, 3, ()), {}, "sizes must be positive"),
        ((3, 3, (4, 0)), {}, "sizes must be positive"),
        ((3, 3, 4), {"norm_activation": "relu"}, "found 'relu', expected one of gelu, l2_norm_gelu"),
        ((3, 3, 4), {"tau": 0.0}, "tau: found 0.0, expected a positive number"),
        ((3, 3, 4), {"tau": math.inf}, "tau: found inf"),
    ],
)
def test_impossible_layers(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenFormerError, match=message):
        Pattention(*arguments, **options)


def test_an_input_of_another_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"found last axis 4 in \[2, 4\], expected 5"):
        make()(torch.zeros(2, 4))


def test_layers_of_one_input_give_what_each_gives_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [Pattention(6, 4, (5, 3), norm_activation="l2_norm_gelu", generator=generator) for _ in range(3)]
    x = torch.randn(2, 7, 6, generator=generator)
    for together, layer in zip(project_together(layers, x), layers, strict=True):
        torch.testing.assert_close(together, layer(x))
    called = []
    layers[1].register_forward_hook(lambda *_: called.append("hook"))
    layers[2].op = lambda *_, **__: torch.zeros(2, 7, 4)
    unlike = [*layers, Pattention(6, 9, 2, generator=generator), torch.nn.Linear(6, 3)]
    sizes = [tuple(out.shape) for out in project_together(unlike, x)]
    assert sizes == [(2, 7, 4)] * 3 + [(2, 7, 9), (2, 7, 3)]
    assert called == ["hook"]
