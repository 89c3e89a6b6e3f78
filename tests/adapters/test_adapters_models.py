"""Adapters in memory and on disk: exact start, on, off, merged, stacked, and refused where they do not belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenformer import (
    grow,
    load_adapter,
    load_model,
    merge_adapters,
    save_adapter,
    save_model,
    without_adapters,
)
from tokenformer.adapters.apply import load_with_adapters, remove_adapters
from tokenformer.adapters.config import AdapterSpec, adapter_growth
from tokenformer.adapters.directory import describe_base
from tokenformer.adapters.measure import base_shift
from tokenformer.errors import TokenFormerError
from tokenformer.models.base import LanguageModel
from tokenformer.models.fingerprint import model_sha256, weights_sha256

KINDS = ["gelu", "l2_norm_gelu", "gelu_l2_norm"]
MakeModel = Callable[..., LanguageModel]
MakeAdapter = Callable[..., Path]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(40, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def base(make_tokenformer: MakeModel, tmp_path: Path) -> Path:
    return save_model(make_tokenformer(), tmp_path / "base")


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """An adapter of a base whose new tokens were moved far from where they start."""

    def make(base: Path, name: str = "first", *, seed: int = 0, **spec: int) -> Path:
        model = load_model(base)
        growth = adapter_growth(model.config, AdapterSpec(**(spec or {"qkv": 2, "ffn": 3})))
        grown = grow(model, **growth.model_dump(exclude_none=True), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        known = dict(model.named_parameters())
        with torch.no_grad():
            for key, parameter in grown.named_parameters():
                if key not in known:
                    parameter.normal_(0.0, 0.5, generator=generator)
        return save_adapter(grown, tmp_path / name, base=base)

    return make


def logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("kind", KINDS)
def test_on_off_and_on_again(
    kind: str, make_tokenformer: MakeModel, make_adapter: MakeAdapter, tmp_path: Path, tokens: Tensor
) -> None:
    base = save_model(make_tokenformer(norm_activation=kind), tmp_path / "base")
    model = load_model(base)
    expected, config = logits(model, tokens), model.config
    load_adapter(model, make_adapter(base))
    adapted = logits(model, tokens)
    assert (adapted - expected).abs().max() > 1e-3
    with without_adapters(model) as off:
        assert off is model
        assert torch.equal(logits(model, tokens), expected)
        assert model.config == config
        assert save_model(model, tmp_path / "again").is_dir()
    assert torch.equal(logits(model, tokens), adapted)
    assert weights_sha256(tmp_path / "again") == weights_sha256(base)
    remove_adapters(model)
    assert torch.equal(logits(model, tokens), expected)


def test_an_error_inside_leaves_the_adapters_on(
    base: Path, make_adapter: MakeAdapter, tokens: Tensor
) -> None:
    model = load_model(base)
    load_adapter(model, make_adapter(base))
    adapted = logits(model, tokens)
    with pytest.raises(RuntimeError, match="inside"), without_adapters(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model, tokens), adapted)


def test_what_is_loaded_is_what_was_saved(
    base: Path, make_tokenformer: MakeModel, tmp_path: Path, tokens: Tensor
) -> None:
    grown = grow(load_model(base), qkv=8, proj=5, ffn=15, seed=3)
    for name, parameter in grown.named_parameters():
        if name.endswith(".1"):
            torch.nn.init.normal_(parameter)
    saved = save_adapter(grown, tmp_path / "adapter", base=base, name="mine", training={"steps": 7})
    stored = load_file(saved / "adapter_model.safetensors")
    assert torch.equal(
        stored["blocks.1.ffn.value_tokens"], grown.get_parameter("blocks.1.ffn.value_tokens.1")
    )
    assert not any("proj" in name for name in stored)
    model = load_with_adapters(base, [saved])
    assert torch.equal(logits(model, tokens), logits(grown, tokens))
    assert model.config.param_token_groups == grown.config.param_token_groups
    loaded = model.adapters[0].config
    assert (loaded.name, loaded.training, loaded.base.name) == ("mine", {"steps": 7}, "base")
    assert loaded.num_parameters() == sum(tensor.numel() for tensor in stored.values())
    assert "# mine: an adapter of base" in (saved / "README.md").read_text()


@pytest.mark.parametrize("consolidate", [True, False])
def test_merging(
    consolidate: bool, base: Path, make_adapter: MakeAdapter, tmp_path: Path, tokens: Tensor
) -> None:
    model = load_with_adapters(base, [make_adapter(base), make_adapter(base, "second", seed=5, proj=4)])
    adapted = logits(model, tokens)
    merge_adapters(model, consolidate=consolidate)
    assert model.adapters == ()
    assert len(model.config.groups("qkv")) == (1 if consolidate else 2)
    plain = load_model(save_model(model, tmp_path / "merged"))
    if consolidate:
        torch.testing.assert_close(logits(plain, tokens), adapted, rtol=0, atol=1e-5)
    else:
        assert torch.equal(logits(plain, tokens), adapted)


@pytest.mark.parametrize("role", ["qkv", "proj", "ffn"])
def test_stacked_effects_add_in_a_layer_of_gelu(
    role: str, base: Path, make_adapter: MakeAdapter, tokens: Tensor
) -> None:
    first, second = make_adapter(base, **{role: 3}), make_adapter(base, "second", seed=9, **{role: 4})
    name = {"qkv": "blocks.0.attention.value", "proj": "blocks.0.attention.proj", "ffn": "blocks.0.ffn"}[role]
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))

    def output(*adapters: Path) -> Tensor:
        return load_with_adapters(base, adapters).get_submodule(name)(x)

    alone = output()
    together = (output(first) - alone) + (output(second) - alone)
    torch.testing.assert_close(output(first, second) - alone, together)
    stacked = load_model(base)
    for adapter in (first, second):  # one after the other: the hash is that of the base alone
        load_adapter(stacked, adapter)
    assert torch.equal(logits(stacked, tokens), logits(load_with_adapters(base, [first, second]), tokens))


def test_of_a_grown_base(base: Path, make_adapter: MakeAdapter, tmp_path: Path, tokens: Tensor) -> None:
    grown = save_model(
        grow(load_model(base), ffn=20), tmp_path / "grown"
    )  # roles with different numbers of groups
    model = load_with_adapters(grown, [make_adapter(grown, qkv=3, proj=2, ffn=7)])
    assert model.config.param_token_groups.model_dump() == {"qkv": (6, 3), "proj": (5, 2), "ffn": (12, 8, 7)}
    with without_adapters(model):
        assert torch.equal(logits(model, tokens), logits(load_model(grown), tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_base_shift(
    kind: str, make_tokenformer: MakeModel, make_adapter: MakeAdapter, tmp_path: Path, tokens: Tensor
) -> None:
    base = save_model(make_tokenformer(norm_activation=kind), tmp_path / "base")
    model = load_with_adapters(base, [make_adapter(base)])
    shifts = base_shift(model, tokens)
    assert len(shifts) == 2 * 4
    if kind == "gelu":
        assert set(shifts.values()) == {0.0}
    else:
        assert all(shift > 1e-3 for shift in shifts.values())
    if kind == "gelu_l2_norm":  # the norm of all tokens is the larger one: what the base adds can only shrink
        assert all(shift < 1 for shift in shifts.values())


def test_hash_in_memory_is_that_of_the_files(base: Path) -> None:
    assert model_sha256(load_model(base)) == weights_sha256(base)


def test_another_base_is_refused_by_hash(
    base: Path, make_adapter: MakeAdapter, make_tokenformer: MakeModel, tmp_path: Path, tokens: Tensor
) -> None:
    adapter = make_adapter(base)
    other = save_model(make_tokenformer(seed=1), tmp_path / "other")
    for attempt in (
        lambda: load_with_adapters(other, [adapter]),
        lambda: load_adapter(load_model(other), adapter),
        lambda: load_adapter(load_model(base), adapter, base=other),
    ):
        with pytest.raises(TokenFormerError) as caught:
            attempt()
        for said in ("'base'", weights_sha256(base), weights_sha256(other)):
            assert said in str(caught.value)
    half = load_model(base, dtype=torch.bfloat16)
    with pytest.raises(TokenFormerError, match="another dtype"):
        load_adapter(half, adapter)
    assert half.adapters == ()
    load_adapter(half, adapter, base=base)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_the_same_weights_with_another_function_are_refused(
    base: Path, make_adapter: MakeAdapter, make_transformer: MakeModel, tmp_path: Path
) -> None:
    adapter = make_adapter(base)
    model = load_model(base)
    values = model.config.model_dump() | {"gelu_approximate": "tanh"}
    model.config = type(model.config).model_validate(values)
    with pytest.raises(TokenFormerError, match="gelu_approximate: found 'tanh', expected 'none'"):
        load_adapter(model, adapter)
    with pytest.raises(TokenFormerError, match="architecture: found 'transformer', expected 'tokenformer'"):
        load_adapter(make_transformer(), adapter)


def test_softmax_and_transformers_are_refused_with_the_reason(
    make_tokenformer: MakeModel, make_transformer: MakeModel, tmp_path: Path
) -> None:
    softmax, plain = make_tokenformer(norm_activation="softmax"), make_transformer()
    with pytest.raises(TokenFormerError, match=r"softmax.*exp\(0\)"):
        adapter_growth(softmax.config, AdapterSpec(ffn=2))
    with pytest.raises(TokenFormerError, match="no parameter tokens"):
        adapter_growth(plain.config, AdapterSpec(ffn=2))
    with pytest.raises(TokenFormerError, match=r"softmax.*exp\(0\)"):
        describe_base(save_model(softmax, tmp_path / "softmax"))


def _lose_a_tensor(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["blocks.0.ffn.key_tokens"]
    save_file(tensors, adapter / "adapter_model.safetensors")


def _reshape(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["blocks.0.ffn.key_tokens"] = torch.zeros(4, 16)
    save_file(tensors, adapter / "adapter_model.safetensors")


def _put_in_nan(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["blocks.0.ffn.key_tokens"][0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")


def _cut_off(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _change_config(**changes: object) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lose_a_tensor, r"missing tensors: blocks\.0\.ffn\.key_tokens"),
        (_reshape, r"blocks\.0\.ffn\.key_tokens: found \[4, 16\], expected \[3, 16\]"),
        (_put_in_nan, r"blocks\.0\.ffn\.key_tokens: holds NaN"),
        (_cut_off, "not a whole safetensors file"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "safetensors"),
        (_change_config(format_version=2), "format_version"),
        (_change_config(param_tokens={"qkv": 0, "proj": 0, "ffn": 0}), "param_tokens"),
        (_change_config(param_token={}), "param_token: unknown field"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "invalid JSON"),
        (lambda adapter: (adapter / "adapter_config.json").unlink(), "no adapter_config.json in it"),
    ],
)
def test_damaged_adapters_are_refused(
    damage: Callable[[Path], None], message: str, base: Path, make_adapter: MakeAdapter, tokens: Tensor
) -> None:
    adapter = make_adapter(base)
    damage(adapter)
    model = load_model(base)
    with pytest.raises(TokenFormerError, match=message):
        load_adapter(model, adapter)
    assert model.adapters == ()
    assert torch.equal(logits(model, tokens), logits(load_model(base), tokens))


def test_what_is_no_adapter_is_named(base: Path, tmp_path: Path) -> None:
    for path, found in ((base, "a model directory"), (tmp_path / "nothing", "no such directory")):
        with pytest.raises(TokenFormerError, match=f"{found}; expected an adapter directory"):
            load_adapter(load_model(base), path)


def test_groups_changed_behind_the_adapters_back(base: Path, make_adapter: MakeAdapter) -> None:
    model = load_with_adapters(base, [make_adapter(base)])
    larger = grow(model, factor=2.0)
    with pytest.raises(TokenFormerError, match="call merge_adapters before"):
        remove_adapters(larger)
    merge_adapters(model, consolidate=False)
    assert grow(model, factor=2.0).config.groups("ffn") == (12, 3, 15)


def test_only_a_base_and_more_is_saved(base: Path, make_tokenformer: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(TokenFormerError, match="adds no parameter tokens"):
        save_adapter(load_model(base), tmp_path / "adapter", base=base)
    other = make_tokenformer(ffn_param_tokens=10)
    with pytest.raises(
        TokenFormerError, match=r"param_token_groups\.ffn: found \[10, 10\], expected the base's \[12\]"
    ):
        save_adapter(grow(other, ffn=20), tmp_path / "adapter", base=base)
    assert not (tmp_path / "adapter").exists()
