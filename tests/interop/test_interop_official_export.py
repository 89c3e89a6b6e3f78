"""Export for the authors' code: grown models by an independent float64 forward, round trips, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from official_reference import Reference
from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.growth.grow import grow
from tokenformer.interop.formats import find_conversion
from tokenformer.interop.official import official_to_native
from tokenformer.interop.official_export import native_to_official
from tokenformer.language.tokenizers import ByteTokenizer
from tokenformer.models.base import LanguageModel
from tokenformer.models.directory import save_model
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
TOKENS = [5, 17, 0, 39, 12, 5, 5, 30, 33, 2, 7]
KINDS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")


def disturbed(model: LanguageModel, seed: int = 1) -> LanguageModel:
    """As if trained a little: every weight moves, so that new keys are no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model: LanguageModel) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].double().numpy()


def read_checkpoint(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    weights = torch.load(directory / "pytorch_model.bin", weights_only=True)
    return json.loads((directory / "config.json").read_text()), weights


def export(model: LanguageModel, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    native_to_official(save_model(model, tmp_path / "native"), tmp_path / "official")
    return read_checkpoint(tmp_path / "official")


def assert_same_function(model: LanguageModel, tmp_path: Path) -> dict[str, Any]:
    """The exported file's logits, by the authors' formula in float64, are those of ``model``, and it reads back."""
    config, weights = export(model, tmp_path)
    expected = logits(model)
    assert expected.std() > 0.1
    np.testing.assert_allclose(Reference(config, weights).logits(TOKENS), expected, rtol=0, atol=1e-5)
    official_to_native(tmp_path / "official", tmp_path / "back")
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_exported_without_growth(kind: str, make_tokenformer, tmp_path: Path) -> None:
    config = assert_same_function(disturbed(make_tokenformer(norm_activation=kind)), tmp_path)
    assert (config["qkv_slot_num"], config["proj_slot_num"], config["ffn_slot_num"]) == (6, 5, 12)
    assert (config["padded_vocab_size"], config["seq_length"], config["rotary_pct"]) == (40, 64, 1.0)


@pytest.mark.parametrize("kind", ["l2_norm_gelu", "gelu_l2_norm"])
def test_grown_exactly(kind: str, make_tokenformer, tmp_path: Path) -> None:
    small = disturbed(make_tokenformer(norm_activation=kind, rotary_pct=0.25), 2)
    model = disturbed(grow(grow(small, qkv=9, proj=7, ffn=30), qkv=20, proj=7, ffn=30))
    assert model.config.tau.ffn == 12
    config = assert_same_function(model, tmp_path)
    appended = 16 if kind == "l2_norm_gelu" else 0  # d
    assert (config["qkv_slot_num"], config["proj_slot_num"]) == (20 + appended, 7 + appended)
    assert config["ffn_slot_num"] == 30 + appended


@pytest.mark.parametrize("kind", KINDS)
def test_grown_by_copies(kind: str, make_tokenformer, tmp_path: Path) -> None:
    model = disturbed(grow(disturbed(make_tokenformer(norm_activation=kind), 2), factor=3, init="copies"))
    config = assert_same_function(model, tmp_path)
    assert (config["qkv_slot_num"], config["ffn_slot_num"]) == (18, 36)  # tau = n again: nothing to append


@pytest.mark.parametrize("kind", ["l2_norm_gelu", "gelu_l2_norm"])
def test_grown_exactly_then_by_copies(kind: str, make_tokenformer, tmp_path: Path) -> None:
    model = grow(disturbed(make_tokenformer(norm_activation=kind), 2), qkv=10, proj=8, ffn=20)
    assert_same_function(disturbed(grow(disturbed(model), factor=2, init="copies")), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [0.7, 100.0])
def test_any_tau(kind: str, tau: float, make_tokenformer, tmp_path: Path) -> None:
    taus = {"qkv": tau, "proj": tau, "ffn": tau / 2}
    assert_same_function(disturbed(make_tokenformer(norm_activation=kind, tau=taus)), tmp_path)


def test_a_logit_scale_moves_into_the_final_norm(make_tokenformer, tmp_path: Path) -> None:
    fields = {"norm_activation": "gelu_l2_norm", "logit_scale": 2.5, "layer_norm_eps": 1e-3}
    config = assert_same_function(disturbed(make_tokenformer(**fields)), tmp_path)
    assert config["layernorm_epsilon"] == 1e-3


def test_the_changes_are_told(make_tokenformer, tmp_path: Path) -> None:
    grown = grow(make_tokenformer(norm_activation="l2_norm_gelu"), ffn=20)
    converted = native_to_official(save_model(grown, tmp_path / "native"), tmp_path / "official")
    (change,) = converted.changes
    assert change == "ffn: tau 12 is not n = 20, so 16 parameter tokens were appended to each layer"
    assert isinstance(converted.config, TokenFormerConfig)
    assert converted.config.ffn_param_tokens == 36
    assert converted.config.num_parameters() == sum(
        tensor.numel() for tensor in read_checkpoint(tmp_path / "official")[1].values()
    )


def test_groups_are_merged_in_order_and_unchanged_bit_for_bit(make_tokenformer, tmp_path: Path) -> None:
    model = make_tokenformer(norm_activation="gelu_l2_norm")
    model = disturbed(grow(model, qkv=8, proj=9, ffn=30, init="random"))  # tau = n
    _, weights = export(model, tmp_path)
    state = model.state_dict()
    for theirs, ours in {"attention.key": "attention.key", "mlp": "ffn"}.items():
        for kind in ("key", "value"):
            merged = torch.cat([state[f"blocks.1.{ours}.{kind}_tokens.{group}"] for group in (0, 1)])
            assert torch.equal(weights[f"sequential.3.{theirs}.{kind}_param_tokens"], merged)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden cases (../shared/golden) are not here")
@pytest.mark.parametrize("case", ["a_l2_norm_gelu", "c_softmax"])
def test_golden_cases_come_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    find_conversion("official", "native")(GOLDEN / case, tmp_path / "native")
    converted = find_conversion("native", "official")(tmp_path / "native", tmp_path / "official")
    config, weights = read_checkpoint(tmp_path / "official")
    first_config, first_weights = read_checkpoint(GOLDEN / case)
    assert config == first_config
    assert weights.keys() == first_weights.keys()
    assert all(torch.equal(weights[key], first_weights[key]) for key in first_weights)
    assert converted.changes == ()


@pytest.mark.parametrize("kind", KINDS)
def test_native_comes_back_bit_for_bit_where_tau_is_n(kind: str, make_tokenformer, tmp_path: Path) -> None:
    model = disturbed(make_tokenformer(norm_activation=kind))
    assert_same_function(model, tmp_path)
    native_to_official(tmp_path / "back", tmp_path / "again")
    (config, weights), (again_config, again) = (
        read_checkpoint(tmp_path / name) for name in ("official", "again")
    )
    assert config == again_config
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_the_tokenizer_and_a_run_directory(make_tokenformer, tmp_path: Path) -> None:
    model = make_tokenformer(norm_activation="softmax", vocab_size=384)
    save_model(model, tmp_path / "run" / "model", tokenizer=ByteTokenizer())
    converted = native_to_official(tmp_path / "run", tmp_path / "official")
    assert converted.has_tokenizer
    names = sorted(path.name for path in (tmp_path / "official").iterdir())
    assert names == ["config.json", "pytorch_model.bin", "tokenizer.json"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"norm_activation": "gelu"},
            "norm_activation 'gelu': the authors' code has no weight function without",
        ),
        ({"gelu_approximate": "tanh"}, "gelu_approximate 'tanh'"),
        ({"norm_eps": 1e-8}, "norm_eps 1e-08"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings false"),
        ({"position_embedding": "none"}, "position_embedding 'none': expected rotary"),
        ({"rope_theta": 500.0}, "rope_theta 500: the authors' is 10000"),
    ],
)
def test_what_cannot_be_represented(
    fields: dict[str, Any], message: str, make_tokenformer, tmp_path: Path
) -> None:
    save_model(make_tokenformer(**{"norm_activation": "l2_norm_gelu", **fields}), tmp_path / "native")
    with pytest.raises(TokenFormerError, match=r"native/config\.json: cannot be written") as caught:
        native_to_official(tmp_path / "native", tmp_path / "official")
    assert message in str(caught.value)
    assert not (tmp_path / "official").exists()


def test_every_reason_is_named_at_once(make_tokenformer, tmp_path: Path) -> None:
    fields = {"norm_activation": "gelu", "position_embedding": "none", "tie_word_embeddings": False}
    save_model(make_tokenformer(**fields), tmp_path / "native")
    with pytest.raises(TokenFormerError) as caught:
        native_to_official(tmp_path / "native", tmp_path / "official")
    assert [name for name in fields if name in str(caught.value)] == list(fields)


def test_a_transformer_is_refused(make_transformer, tmp_path: Path) -> None:
    save_model(make_transformer(), tmp_path / "native")
    with pytest.raises(TokenFormerError, match="model_type is 'transformer'"):
        native_to_official(tmp_path / "native", tmp_path / "official")


def test_nan_weights_are_reported(make_tokenformer, tmp_path: Path) -> None:
    model = make_tokenformer(norm_activation="softmax")
    with torch.no_grad():
        model.blocks[0].ffn.key_tokens[0][2, 3] = float("nan")
    save_model(model, tmp_path / "native")
    with pytest.raises(TokenFormerError, match="1 of 192 weights are NaN or infinite"):
        native_to_official(tmp_path / "native", tmp_path / "official")
    assert not (tmp_path / "official").exists()


def test_an_output_with_content_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "official").mkdir()
    (tmp_path / "official" / "mine.txt").write_text("keep")
    with pytest.raises(TokenFormerError, match="already there"):
        native_to_official(tmp_path / "absent", tmp_path / "official")


def test_half_precision_models_are_written_in_float32(make_tokenformer, tmp_path: Path) -> None:
    model = make_tokenformer(norm_activation="softmax").to(torch.bfloat16)
    _, weights = export(model, tmp_path)
    exported = weights["sequential.0.word_embeddings.weight"]
    assert exported.dtype == torch.float32
    assert torch.equal(exported, model.state_dict()["embedding.weight"].float())


def test_a_wide_layer_grown_a_lot(tmp_path: Path) -> None:
    """n far above d, and the published shape of growth: 64 -> 150 tokens."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"qkv_param_tokens": 64, "proj_param_tokens": 64, "ffn_param_tokens": 256}
    fields = {**sizes, **tokens, "norm_activation": "l2_norm_gelu", "max_position_embeddings": 32}
    model = build_model(TokenFormerConfig(**fields), seed=3)
    assert_same_function(disturbed(grow(model, qkv=150, proj=150, ffn=600)), tmp_path)
