"""Configurations: what cannot be is refused in the words of the field; counts agree with the built models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tokenformer import TokenFormer, TokenFormerConfig, TokenFormerError, Transformer, TransformerConfig
from tokenformer.models.base import LanguageModel
from tokenformer.models.config import DecoderConfig
from tokenformer.models.registry import build_model, load_config, parse_config
from tokenformer.validation import validate

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "qkv_param_tokens": 8,
    "proj_param_tokens": 10,
    "ffn_param_tokens": 12,
}


def tokenformer(**fields: Any) -> TokenFormerConfig:
    return validate(TokenFormerConfig, SIZES | fields, source="test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5}, "test: num_attention_heads 5 does not divide hidden_size 24"),
        (
            {"rotary_pct": 0.5},
            "test: rotary_pct 0.5 rotates 3 of 6 head features; expected an even number, since features are "
            "rotated in pairs",
        ),
        ({"hidden_size": 20}, "test: rotary_pct 1.0 rotates 5 of 5 head features"),
        ({"qkv_param_tokens": 0}, "test: qkv_param_tokens: found 0; input should be greater than 0"),
        ({"ffn_param_tokens": -4}, "test: ffn_param_tokens: found -4; input should be greater than 0"),
        ({"num_hidden_layers": 0}, "test: num_hidden_layers: found 0; input should be greater than 0"),
        ({"vocab_size": 2.5}, "test: vocab_size: found 2.5; input should be a valid integer"),
        (
            {"param_token_groups": {"qkv": [4, 3], "proj": [10], "ffn": [12]}},
            "test: param_token_groups.qkv [4, 3] add up to 7, but qkv_param_tokens is 8",
        ),
        (
            {"param_token_groups": {"qkv": [8], "proj": [10]}},
            "test: param_token_groups.ffn: missing, but required",
        ),
        ({"tau": {"qkv": 8, "proj": 10, "ffn": 0}}, "test: tau.ffn: found 0; input should be greater than 0"),
        ({"tau": {"qkv": 8, "prj": 10, "ffn": 1}}, "test: tau.prj: unknown field; did you mean 'proj'?"),
        (
            {"norm_activation": "gelu_norm"},
            "test: norm_activation: found 'gelu_norm'; input should be 'gelu'",
        ),
        ({"layer_norm_eps": float("nan")}, "test: layer_norm_eps: found nan; input should be"),
        ({"hiden_size": 3}, "test: hiden_size: unknown field; did you mean 'hidden_size'?"),
        ({"use_bias": True}, "test: use_bias: unknown field"),
        (
            {"architecture": "transformer"},
            "test: architecture: found 'transformer'; input should be 'tokenformer'",
        ),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenFormerError) as caught:
        tokenformer(**fields)
    assert message in str(caught.value)
    assert str(caught.value).count("\n") == (1 if "prj" in message else 0)  # one line for each problem


def test_sizes_that_have_no_rotary_pairs_are_free() -> None:
    assert tokenformer(hidden_size=20, position_embedding="none").rotary_dim == 0
    assert tokenformer(hidden_size=20, rotary_pct=0.0).rotary_dim == 0
    assert tokenformer(rotary_pct=0.34).rotary_dim == 2


def test_defaults_and_immutability() -> None:
    config = tokenformer()
    assert config.groups("proj") == (10,)
    assert config.tau.ffn == 12.0
    assert (
        TransformerConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=2).mlp_size
        == 16
    )
    with pytest.raises(ValueError, match="frozen"):
        config.hidden_size = 3


@pytest.mark.parametrize("config", [tokenformer(rotary_pct=0.34, tau={"qkv": 1.5, "proj": 2.0, "ffn": 3.0})])
def test_json_round_trip_in_hugging_face_words(config: DecoderConfig) -> None:
    text = json.dumps(config.to_json())
    values = json.loads(text)
    assert values["model_type"] == "tokenformer"
    assert values["architectures"] == ["TokenFormerForCausalLM"]
    assert "architecture" not in values
    assert (
        parse_config(values | {"torch_dtype": "float32", "transformers_version": "5"}, source="test")
        == config
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "tokenfromer"},
            "model_type: 'tokenfromer' is not a known architecture; did you mean 'tokenf",
        ),
        ({"model_type": ["gpt2"]}, "is not a known architecture"),
        ({"model_type": None}, "'None' is not a known architecture"),
        ({"num_heads": 3}, "num_heads: unknown field; did you mean"),
    ],
)
def test_a_config_file_of_something_else(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tokenformer().to_json() | change))
    with pytest.raises(TokenFormerError) as caught:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert message in str(caught.value)


def test_a_config_file_without_a_model_type_and_of_another_class(tmp_path: Path) -> None:
    values = tokenformer().to_json()
    del values["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        TokenFormerError, match="model_type: missing, expected one of tokenformer, transformer"
    ):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tokenformer().to_json()))
    assert DecoderConfig.load(tmp_path) == TokenFormerConfig.load(tmp_path) == tokenformer()
    with pytest.raises(TokenFormerError, match="model_type is 'tokenformer', expected TransformerConfig"):
        TransformerConfig.load(tmp_path)


def test_counts_and_roles_agree_with_the_built_model(any_model: LanguageModel) -> None:
    counts: dict[str, int] = {}
    products = any_model.head.weight.numel()
    for name, parameter in any_model.named_parameters():
        role = any_model.role_of(name)
        part = "attention" if role in ("qkv", "proj") else role
        counts[part] = counts.get(part, 0) + parameter.numel()
        if parameter.ndim == 2 and part in ("attention", "ffn"):
            products += parameter.numel()
    config = any_model.config
    expected = {part: n for part, n in config.parameter_counts().items() if n}
    assert expected == counts
    assert config.num_parameters() == sum(p.numel() for p in any_model.parameters())
    assert config.product_parameters() == products
    # causal: query i meets i + 1 keys, in two products of multiply-adds for each of the d features
    t, d, layers = 7, config.hidden_size, config.num_hidden_layers
    attention = 3 * layers * sum(2 * 2 * d * (i + 1) for i in range(t)) / t
    assert config.flops_per_token(t) == pytest.approx(6 * products + attention, rel=1e-12)


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "attention_tokens", "ffn_tokens", "millions"),
    [
        (12, 768, 12, 768, 3072, 150),
        (24, 1024, 16, 1024, 4096, 450),
        (32, 1280, 16, 1280, 5120, 900),
        (40, 1536, 16, 1536, 6144, 1500),
        (24, 1024, 16, 768, 3072, 354),
        (24, 1024, 16, 1792, 7168, 757),
        (12, 768, 12, 576, 2304, 124),
        (12, 768, 12, 2140, 8560, 354),
        (12, 768, 12, 4872, 19488, 757),
        (12, 768, 12, 9232, 36928, 1400),
    ],
)
def test_published_sizes(
    layers: int, hidden: int, heads: int, attention_tokens: int, ffn_tokens: int, millions: int
) -> None:
    config = TokenFormerConfig(
        vocab_size=50304,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        qkv_param_tokens=attention_tokens,
        proj_param_tokens=attention_tokens,
        ffn_param_tokens=ffn_tokens,
    )
    by_hand = 50304 * hidden + 2 * hidden + layers * 2 * hidden * (4 * attention_tokens + ffn_tokens)
    assert config.num_parameters() == by_hand
    assert by_hand / 1e6 == pytest.approx(millions, rel=0.06)  # as they are called
    if layers * hidden < 10_000:  # built without memory
        with torch.device("meta"):
            assert sum(p.numel() for p in TokenFormer(config).parameters()) == by_hand


@pytest.mark.parametrize("initializer", ["fan_in", "published"])
def test_initial_spread_of_a_tokenformer(initializer: str) -> None:
    config = tokenformer(
        hidden_size=128,
        num_hidden_layers=3,
        qkv_param_tokens=96,
        proj_param_tokens=200,
        ffn_param_tokens=400,
        initializer=initializer,
        tie_word_embeddings=False,
    )
    model = build_model(config)
    for name, parameter in model.named_parameters():
        role = model.role_of(name)
        if role == "norm":
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
            continue
        if role in ("embedding", "head"):
            expected = 0.02 if initializer == "published" else (2 / (5 * 128)) ** 0.5
        elif "key_tokens" in name:
            expected = 0.02 if initializer == "published" else 128**-0.5
        elif initializer == "published":
            expected = 2 / (3 * 128**0.5)
        else:
            expected = 0.5 * config.param_tokens(role) ** -0.5 / (1 if role == "qkv" else 6**0.5)
        assert parameter.std().item() == pytest.approx(expected, rel=0.04), name
        assert abs(parameter.mean().item()) < 0.05 * expected, name


@pytest.mark.parametrize("initializer", ["fan_in", "published"])
def test_initial_spread_of_a_transformer(initializer: str) -> None:
    config = TransformerConfig(
        vocab_size=384,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=200,
        use_bias=True,
        initializer=initializer,
    )
    small, wang = (2 / (5 * 128)) ** 0.5, 2 / (3 * 128**0.5)
    expected = {
        "embedding": (small, small),
        "query": (small, small),
        "up": (small, small),
        "proj": ((6 * 128) ** -0.5, wang),
        "down": ((6 * 200) ** -0.5, wang),
    }
    for name, parameter in build_model(config).named_parameters():
        part = name.split(".")[-2]
        if name.endswith("bias"):
            assert not parameter.any()
        elif part in expected:
            wanted = expected[part][initializer == "published"]
            assert parameter.std().item() == pytest.approx(wanted, rel=0.04), name


@pytest.mark.parametrize(
    "config", [tokenformer(), TransformerConfig(**{k: SIZES[k] for k in list(SIZES)[:4]})]
)
def test_built_from_the_seed_alone(config: DecoderConfig) -> None:
    def weights(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        return nn.utils.parameters_to_vector(build_model(config, seed=seed).parameters())

    assert torch.equal(weights(3, 0), weights(3, 1))
    assert not torch.equal(weights(3, 0), weights(4, 0))


def test_classes_build_directly() -> None:
    assert type(build_model(tokenformer())) is type(TokenFormer(tokenformer()))
    config = TransformerConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
    assert type(build_model(config)) is type(Transformer(config))
