"""Growth of whole models: what it keeps, what it says, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tokenformer import Pattention, TokenFormerError, grow, load_model, save_model
from tokenformer.growth.grow import grow_model
from tokenformer.growth.measure import logit_change
from tokenformer.growth.spec import GrowthSpec
from tokenformer.interop.official import official_to_native
from tokenformer.models.base import LanguageModel
from tokenformer.ops.pattention import NORM_ACTIVATIONS

EXACT_KINDS = ("gelu", "l2_norm_gelu", "gelu_l2_norm")
ROLES = ("qkv", "proj", "ffn")


def draw_tokens(*shape: int) -> Tensor:
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(0))


def train(model: nn.Module, steps: int = 2) -> None:
    """A few steps, so that nothing is at its initial value."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = draw_tokens(2, 12)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    optimizer.zero_grad()


def assert_agrees_with_its_configuration(model: Any) -> None:
    config = model.config
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    for block in model.blocks:
        layers = {
            "qkv": (block.attention.query, block.attention.key, block.attention.value),
            "proj": (block.attention.proj,),
            "ffn": (block.ffn,),
        }
        for role in ROLES:
            for layer in layers[role]:
                assert layer.groups == config.groups(role)
                assert layer.num_param_tokens == config.param_tokens(role)
                assert layer.tau == getattr(config.tau, role)


@settings(max_examples=30)
@given(data=st.data())
def test_exact_growth_changes_no_bit(make_tokenformer: Callable[..., Any], data: st.DataObject) -> None:
    """Over sizes, kinds, eps and repeated growth, with training between."""
    draw = data.draw
    heads, head_size = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4]))
    model = make_tokenformer(
        hidden_size=heads * head_size,
        num_attention_heads=heads,
        num_hidden_layers=draw(st.integers(1, 2)),
        norm_activation=draw(st.sampled_from(EXACT_KINDS)),
        norm_eps=draw(st.sampled_from([0.0, 1e-5])),
        gelu_approximate=draw(st.sampled_from(["none", "tanh"])),
        initializer=draw(st.sampled_from(["fan_in", "published"])),
        **{f"{role}_param_tokens": draw(st.integers(1, 9)) for role in ROLES},
        seed=draw(st.integers(0, 99)),
    )
    tokens = draw_tokens(2, 9)
    for _ in range(draw(st.integers(1, 3))):
        train(model, steps=1)
        targets = {role: model.config.param_tokens(role) + draw(st.integers(0, 7)) for role in ROLES}
        targets["ffn"] += 1
        larger = grow(model, **targets, seed=draw(st.integers(0, 9)))
        assert logit_change(model, larger, tokens) == 0.0
        assert larger.config.num_parameters() > model.config.num_parameters()
        assert_agrees_with_its_configuration(larger)
        model = larger
    assert model.config.tau.ffn == model.config.groups("ffn")[0]


def test_values_of_zero_change_no_bit_train_and_survive_the_disk(
    make_tokenformer: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_tokenformer()
    tokens = draw_tokens(2, 9)
    for targets in ({"factor": 2.0}, {"ffn": 40}):
        train(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        larger = grow(model, **targets, new_tokens="zero_values", optimizer=optimizer)
        assert logit_change(model, larger, tokens) == 0.0
        assert_agrees_with_its_configuration(larger)
        nn.functional.cross_entropy(larger(tokens).logits.flatten(0, 1), tokens.roll(1).flatten()).backward()
        group = len(larger.config.groups("ffn")) - 1
        keys, values = larger.blocks[0].ffn.key_tokens[group], larger.blocks[0].ffn.value_tokens[group]
        assert keys.abs().min() > 0
        assert values.grad.abs().max() > 1e-7
        assert not keys.grad.any()
        optimizer.step()
        assert values.abs().min() > 0
        model = larger
    loaded = load_model(save_model(model, tmp_path / "model"))
    assert [step.new_tokens for step in loaded.config.growth_history] == ["zero_values", "zero_values"]
    assert logit_change(model, loaded, tokens) == 0.0


@settings(max_examples=20)
@given(data=st.data())
def test_copies_keep_the_function_to_rounding(
    make_tokenformer: Callable[..., Any], data: st.DataObject
) -> None:
    draw = data.draw
    model = make_tokenformer(
        norm_activation=draw(st.sampled_from(NORM_ACTIVATIONS)), seed=draw(st.integers(0, 99))
    )
    tokens = draw_tokens(2, 9)
    for _ in range(draw(st.integers(1, 2))):
        train(model, steps=1)
        factors = {role: draw(st.integers(1, 3)) for role in ("qkv", "proj")} | {
            "ffn": draw(st.integers(2, 3))
        }
        targets = {role: r * model.config.param_tokens(role) for role, r in factors.items()}
        larger = grow(model, **targets, init="copies", seed=draw(st.integers(0, 9)))
        assert logit_change(model, larger, tokens) < 2e-5
        for role, r in factors.items():
            assert getattr(larger.config.tau, role) == r * getattr(model.config.tau, role)
        assert_agrees_with_its_configuration(larger)
        model = larger


@pytest.mark.parametrize("kind", NORM_ACTIVATIONS)
def test_random_growth_moves_the_function(make_tokenformer: Callable[..., Any], kind: str) -> None:
    model = make_tokenformer(norm_activation=kind)
    larger = grow(model, factor=2.0, init="random")
    assert logit_change(model, larger, draw_tokens(2, 9)) > 0.01
    assert [getattr(larger.config.tau, role) for role in ROLES] == [12, 10, 24]
    assert_agrees_with_its_configuration(larger)


def test_many_rows_go_through_in_other_blocks_and_stay_exact(make_tokenformer: Callable[..., Any]) -> None:
    model = make_tokenformer(ffn_param_tokens=500, max_position_embeddings=2048)
    larger = grow(model, ffn=4000)
    assert logit_change(model, larger, draw_tokens(2, 1100)) <= 1e-6


def test_the_published_way_with_zero_keys_would_not_be_exact(make_tokenformer: Callable[..., Any]) -> None:
    """tau := n, as the released code computes it, moves the function: what exact growth is for."""
    model = make_tokenformer(norm_activation="l2_norm_gelu")
    larger = grow(model, factor=2.0)
    for layer in larger.modules():
        if isinstance(layer, Pattention):
            layer.kind = layer.kind._replace(tau=float(layer.num_param_tokens))
    assert logit_change(model, larger, draw_tokens(2, 9)) > 0.1


@pytest.mark.parametrize(
    ("case", "init"), [("a_l2_norm_gelu", "exact"), ("a_l2_norm_gelu", "copies"), ("c_softmax", "copies")]
)
def test_a_grown_golden_case_still_gives_the_golden_logits(
    case: str, init: str, shared: Path, tmp_path: Path
) -> None:
    golden = shared / "golden" / case
    if not golden.is_dir():
        pytest.skip(f"{golden} is not there")
    official_to_native(golden, tmp_path / "model")
    larger = grow(load_model(tmp_path / "model"), factor=2.0, init=init)
    expected = np.load(golden / "expected.npz")
    with torch.no_grad():
        found = larger(torch.from_numpy(expected["input_ids"])).logits.numpy()
    np.testing.assert_allclose(found, expected["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", ["exact", "copies", "random"])
def test_a_copy_is_returned_that_trains_and_survives_the_disk(
    make_tokenformer: Callable[..., Any], init: str, tmp_path: Path
) -> None:
    model = make_tokenformer()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    larger = grow(model, factor=2.0, init=init)
    tokens = draw_tokens(2, 9)
    losses = []
    optimizer = torch.optim.AdamW(larger.parameters(), lr=1e-2)
    for _ in range(8):
        loss = nn.functional.cross_entropy(larger(tokens).logits.flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in larger.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    loaded = load_model(save_model(larger, tmp_path / "model"))
    assert_agrees_with_its_configuration(loaded)
    assert logit_change(larger, loaded, tokens) == 0.0


def test_gradients_reach_every_new_key_at_once(make_tokenformer: Callable[..., Any]) -> None:
    larger = grow(make_tokenformer(), factor=2.0)
    tokens = draw_tokens(2, 9)
    nn.functional.cross_entropy(larger(tokens).logits.flatten(0, 1), tokens.roll(1).flatten()).backward()
    new_keys = [p.grad for name, p in larger.named_parameters() if name.endswith("key_tokens.1")]
    assert len(new_keys) == 10
    assert all(grad.abs().max() > 1e-7 for grad in new_keys)


def test_growing_twice_with_one_seed_draws_different_tokens(make_tokenformer: Callable[..., Any]) -> None:
    model = make_tokenformer()
    once = grow(model, ffn=24, seed=3)
    again, other = grow(model, ffn=24, seed=3), grow(model, ffn=24, seed=4)
    twice = grow(once, ffn=36, seed=3)

    def values(grown: Any, group: int, block: int = 0) -> Tensor:
        return grown.blocks[block].ffn.value_tokens[group]

    assert torch.equal(values(once, 1), values(again, 1))
    assert not torch.equal(values(once, 1), values(other, 1))
    assert not torch.equal(values(once, 1), values(once, 1, block=1))
    assert not torch.allclose(
        values(twice, 1) / values(twice, 1).std(), values(twice, 2) / values(twice, 2).std()
    )


def test_history_groups_and_tau_are_recorded(make_tokenformer: Callable[..., Any]) -> None:
    model = grow_model(make_tokenformer(), GrowthSpec(ffn=20), step=100).model
    model = grow_model(model, GrowthSpec(factor=2, init="copies"), step=250).model
    model = grow(model, qkv=20, init="random")
    config = model.config
    assert [step.model_dump() for step in config.growth_history] == [
        {
            "init": init,
            "new_tokens": new_tokens,
            "step": step,
            "qkv_param_tokens": q,
            "proj_param_tokens": p,
            "ffn_param_tokens": f,
        }
        for init, new_tokens, step, q, p, f in (
            ("exact", "zero_keys", 100, 6, 5, 20),
            ("copies", None, 250, 12, 10, 40),
            ("random", None, None, 20, 10, 40),
        )
    ]
    assert config.groups("qkv") == (6, 6, 8)
    assert config.groups("proj") == (5, 5)
    assert config.groups("ffn") == (12, 8, 12, 8)
    assert (config.tau.qkv, config.tau.proj, config.tau.ffn) == (20, 10, 24)
    assert_agrees_with_its_configuration(model)


def test_any_module_with_pattention_layers_grows() -> None:
    torch.manual_seed(0)
    shared_layer = Pattention(6, 6, 4)
    module = nn.ModuleDict(
        {
            "first": Pattention(3, 6, 5, norm_activation="l2_norm_gelu"),
            "rest": nn.Sequential(shared_layer, nn.Linear(6, 2)),
        }
    )
    module["again"] = shared_layer

    def run(m: nn.ModuleDict) -> Tensor:
        return m["rest"](m["again"](m["first"](torch.linspace(-1, 1, 12).reshape(4, 3))))

    larger = grow(module, factor=2.5)
    assert torch.equal(run(larger), run(module))
    assert larger["first"].groups == (5, 7)  # 12.5, rounded to even
    assert larger["again"] is larger["rest"][0]
    assert larger["again"].groups == (4, 6)
    assert module["first"].groups == (5,)
    alone = grow(Pattention(3, 2, 4), factor=3, init="copies")
    assert alone.groups == (4, 8)


def test_a_model_inside_another_module_keeps_its_configuration_true(
    make_tokenformer: Callable[..., Any], make_transformer: Callable[..., Any]
) -> None:
    pair = nn.ModuleDict({"student": make_tokenformer(), "teacher": make_transformer()})
    larger = grow(pair, factor=2.0)
    assert_agrees_with_its_configuration(larger["student"])
    assert larger["student"].config.ffn_param_tokens == 24
    assert larger["teacher"].config == pair["teacher"].config


@pytest.mark.parametrize(
    ("fields", "sizes", "message"),
    [
        (
            {"norm_activation": "softmax"},
            {"factor": 2},
            "not possible for norm_activation 'softmax'.*use init 'copies'",
        ),
        ({}, {"ffn": 11}, "ffn: found 11, but there are 12 parameter tokens already; growth only adds"),
        (
            {},
            {"ffn": 25, "init": "copies"},
            "ffn: found 25, but init 'copies' needs a whole multiple of the 12",
        ),
        ({}, {"factor": 1.5, "init": "copies"}, "needs a whole multiple"),
        (
            {"norm_activation": "l2_norm_gelu"},
            {"factor": 2, "new_tokens": "zero_values"},
            "'zero_values' is not exact for norm_activation 'l2_norm_gelu'.*only 'gelu' weighs each token alone",
        ),
        (
            {},
            {"factor": 2, "init": "copies", "new_tokens": "zero_values"},
            "'zero_values' belongs to init 'exact', but init is 'copies'",
        ),
        ({}, {"factor": 2, "new_tokens": "none"}, "new_tokens: found 'none'; input should be 'zero_keys' or"),
        ({}, {"qkv": 6}, "nothing would grow"),
        ({}, {"factor": 1.01}, "nothing would grow"),
        ({}, {"factor": 1.0}, "factor: found 1.0; input should be greater than 1"),
        ({}, {"factor": 2, "ffn": 24}, "expected either factor, or some of qkv, proj and ffn"),
        ({}, {}, "expected either factor, or some of qkv, proj and ffn"),
        (
            {},
            {"factor": 2, "init": "zero"},
            "init: found 'zero'; input should be 'exact', 'copies' or 'random'",
        ),
        ({}, {"qkv": 0}, "qkv: found 0; input should be greater than 0"),
    ],
)
def test_refusals(
    make_tokenformer: Callable[..., Any], fields: dict[str, Any], sizes: dict[str, Any], message: str
) -> None:
    model = make_tokenformer(**fields)
    with pytest.raises(TokenFormerError, match=message) as caught:
        grow(model, **sizes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", [{"hidden_size": 32}, {"num_hidden_layers": 4, "factor": 2}])
def test_width_and_depth_never_grow(asked: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="growth changes the number of parameter tokens, never width or depth"
    ):
        GrowthSpec(**asked)


def test_what_has_no_parameter_tokens(make_transformer: Callable[..., Any]) -> None:
    with pytest.raises(TokenFormerError, match="Transformer contains no Pattention layer"):
        grow(make_transformer(), factor=2)
    with pytest.raises(TokenFormerError, match="Linear contains no Pattention layer"):
        grow(nn.Linear(2, 2), factor=2)
    with pytest.raises(TokenFormerError, match="name the layers of a TokenFormer; for Sequential use factor"):
        grow(nn.Sequential(Pattention(2, 2, 4)), qkv=8)
    with pytest.raises(TokenFormerError, match=r"factor 1\.01 adds no parameter token"):
        grow(nn.Sequential(Pattention(2, 2, 4)), factor=1.01)


def test_copies_of_frozen_groups_are_refused_and_nothing_changes(
    make_tokenformer: Callable[..., Any],
) -> None:
    model: LanguageModel = make_tokenformer()
    model.blocks[1].ffn.freeze(0)
    with pytest.raises(TokenFormerError, match="a group is frozen"):
        grow(model, factor=2, init="copies")
    assert_agrees_with_its_configuration(model)
    larger = grow(model, factor=2)
    assert not larger.blocks[1].ffn.key_tokens[0].requires_grad
    assert larger.blocks[1].ffn.key_tokens[1].requires_grad
