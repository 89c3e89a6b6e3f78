"""GPT-NeoX directories against transformers: logits both ways, exact weights, and everything that can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.interop.formats import find_conversion
from tokenformer.interop.gpt_neox import gpt_neox_to_native, native_to_gpt_neox
from tokenformer.language.tokenizers import ByteTokenizer
from tokenformer.models.base import LanguageModel
from tokenformer.models.directory import load_model, save_model
from tokenformer.models.transformer.config import TransformerConfig

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TOKENS = torch.tensor([[5, 17, 0, 39, 12, 5, 5, 30, 33, 2, 7, 49], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])

# Shapes of transformers' models; "rotary_pct" goes in as its version 5 names it.
CASES: dict[str, dict[str, Any]] = {
    "pythia": {"rotary_pct": 0.25, "num_attention_heads": 3},
    "sequential": {"use_parallel_residual": False, "rotary_pct": 0.5},
    "tied": {"tie_word_embeddings": True, "rotary_pct": 1.0},
    "tanh gelu": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    "fast gelu, other base": {"hidden_act": "gelu_fast", "rotary_emb_base": 500.0, "rotary_pct": 0.5},
    "one wide layer": {
        "num_hidden_layers": 1,
        "hidden_size": 96,
        "num_attention_heads": 2,
        "rotary_pct": 0.34,
    },
    "biases of the MLP alone": {"attention_bias": False},
}


def reference(case: dict[str, Any], *, seed: int = 0) -> Any:
    """A GPTNeoXForCausalLM whose every parameter, biases and norms too, is random."""
    fields = dict(SIZES | case)
    pct, base = fields.pop("rotary_pct", 0.25), fields.pop("rotary_emb_base", 10000.0)
    rope = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": pct}
    config = transformers.GPTNeoXConfig(**fields, rope_parameters=rope, rotary_pct=pct, rotary_emb_base=base)
    model = transformers.GPTNeoXForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(TOKENS).logits.numpy()


def tensors(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = reference(CASES[case])
    theirs.save_pretrained(tmp_path / "neox")
    converted = find_conversion("gpt-neox", "native")(tmp_path / "neox", tmp_path / "native")
    model = load_model(tmp_path / "native")
    assert isinstance(model.config, TransformerConfig)
    assert converted.config.num_parameters() == sum(p.numel() for p in model.parameters())
    expected = logits(theirs)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [name for name in CASES if name != "biases of the MLP alone"])
def test_there_and_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    theirs = reference(CASES[case])
    theirs.save_pretrained(tmp_path / "neox")
    gpt_neox_to_native(tmp_path / "neox", tmp_path / "native")
    back = native_to_gpt_neox(tmp_path / "native", tmp_path / "back")
    assert back.changes == ()
    first, again = tensors(tmp_path / "neox"), tensors(tmp_path / "back")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(loaded).__name__ == "GPTNeoXForCausalLM"
    np.testing.assert_allclose(logits(loaded), logits(theirs), rtol=0, atol=2e-6)


def test_missing_attention_biases_become_zeros(tmp_path: Path) -> None:
    theirs = reference({"attention_bias": False})
    theirs.save_pretrained(tmp_path / "neox")
    converted = gpt_neox_to_native(tmp_path / "neox", tmp_path / "native")
    assert converted.changes == (
        "attention_bias is false: the attention's biases, which use_bias gives, are zeros",
    )
    native_to_gpt_neox(tmp_path / "native", tmp_path / "back")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    np.testing.assert_allclose(logits(loaded), logits(theirs), rtol=0, atol=2e-6)


def disturbed(model: LanguageModel) -> LanguageModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"use_bias": True, "use_parallel_residual": True, "tie_word_embeddings": False, "rotary_pct": 0.5},
        {"use_bias": False},
        {"use_bias": False, "layer_norm_affine": False, "hidden_act": "gelu_tanh"},
        {"use_bias": True, "logit_scale": 0.25, "rope_theta": 500.0},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_any_transformer_of_ours_in_transformers(
    fields: dict[str, Any], make_transformer: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    model = disturbed(make_transformer(**{"vocab_size": 50, **fields}))
    save_model(model, tmp_path / "native")
    native_to_gpt_neox(tmp_path / "native", tmp_path / "neox")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "neox", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(logits(loaded), logits(model), rtol=0, atol=1e-5)
    gpt_neox_to_native(tmp_path / "neox", tmp_path / "again")
    again = load_model(tmp_path / "again")
    np.testing.assert_allclose(logits(again), logits(model), rtol=0, atol=1e-5)
    assert isinstance(again.config, TransformerConfig)
    assert again.config.use_bias == fields["use_bias"]


def test_the_tokenizer_travels(make_transformer: Callable[..., LanguageModel], tmp_path: Path) -> None:
    save_model(make_transformer(vocab_size=384), tmp_path / "run" / "model", tokenizer=ByteTokenizer())
    assert native_to_gpt_neox(tmp_path / "run", tmp_path / "neox").has_tokenizer
    config = json.loads((tmp_path / "neox" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (256, 256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "neox")
    assert tokenizer("aé").input_ids == [97, 195, 169]
    assert gpt_neox_to_native(tmp_path / "neox", tmp_path / "again").has_tokenizer


def test_half_precision_is_kept(tmp_path: Path) -> None:
    reference({}).to(torch.bfloat16).save_pretrained(tmp_path / "neox")
    assert gpt_neox_to_native(tmp_path / "neox", tmp_path / "native").dtype == "bfloat16"
    assert load_model(tmp_path / "native").embedding.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert native_to_gpt_neox(tmp_path / "native", tmp_path / "back").dtype == "bfloat16"


def test_what_older_versions_stored(tmp_path: Path) -> None:
    """Pickled weights with the causal mask and rotary frequencies, and the rotary fields under their old names."""
    theirs = reference({"rotary_pct": 0.5})
    theirs.save_pretrained(tmp_path / "neox")
    weights = tensors(tmp_path / "neox")
    (tmp_path / "neox" / "model.safetensors").unlink()
    for block in range(2):
        attention = f"gpt_neox.layers.{block}.attention"
        weights[f"{attention}.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()
        weights[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        weights[f"{attention}.rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(0, 4, 2) / 4)
    torch.save(weights, tmp_path / "neox" / "pytorch_model.bin")
    edit(tmp_path / "neox", rotary_pct=0.5, rotary_emb_base=10000, rope_parameters=None)
    gpt_neox_to_native(tmp_path / "neox", tmp_path / "native")
    np.testing.assert_allclose(logits(load_model(tmp_path / "native")), logits(theirs), rtol=0, atol=1e-5)
    weights["gpt_neox.layers.1.attention.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    torch.save(weights, tmp_path / "neox" / "pytorch_model.bin")
    with pytest.raises(
        TokenFormerError, match=r"layers\.1\.attention\.bias: not what the configuration says"
    ):
        gpt_neox_to_native(tmp_path / "neox", tmp_path / "other")


def edit(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "model_type: found 'llama', expected 'gpt_neox'"),
        ({"hidden_act": "silu"}, "hidden_act: found 'silu'"),
        ({"hidden_size": 25}, "num_attention_heads 3 does not divide hidden_size 25"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "found rope_type 'linear'"),
        ({"rotary_pct": 0.5}, "rotary_pct: found 0.5, but rope_parameters say 0.25"),
        ({"rope_parameters": 3}, "rope_parameters: found 3, expected an object"),
        ({"vocab_size": 60}, "gpt_neox.embed_in.weight: found shape [50, 24], expected [60, 24]"),
        ({"num_hidden_layers": 3}, "12 keys missing: gpt_neox.layers.2.attention.query_key_value.weight"),
        ({"tie_word_embeddings": True}, "embed_out.weight: not what the configuration says"),
    ],
)
def test_wrong_configurations(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    reference({}).save_pretrained(tmp_path / "neox")
    edit(tmp_path / "neox", **fields)
    with pytest.raises(TokenFormerError) as caught:
        gpt_neox_to_native(tmp_path / "neox", tmp_path / "native")
    assert message in str(caught.value)
    assert not (tmp_path / "native").exists()


def test_nan_and_what_gpt_neox_lacks(
    make_transformer: Callable[..., LanguageModel],
    make_tokenformer: Callable[..., LanguageModel],
    tmp_path: Path,
) -> None:
    model = make_transformer()
    with torch.no_grad():
        model.blocks[0].ffn.up.weight[0, 0] = float("nan")  # type: ignore[index, union-attr]
    for name, refused, message in [
        ("nan", model, "1 of 384 weights are NaN or infinite"),
        ("none", make_transformer(position_embedding="none"), "no rotary positions"),
        ("tokenformer", make_tokenformer(), "GPT-NeoX directories hold Transformers only"),
    ]:
        save_model(refused, tmp_path / name)
        with pytest.raises(TokenFormerError, match=message):
            native_to_gpt_neox(tmp_path / name, tmp_path / "neox")
        assert not (tmp_path / "neox").exists()


def test_the_command(run_command: Any, tmp_path: Path) -> None:
    reference({"attention_bias": False}).save_pretrained(tmp_path / "neox")
    (tmp_path / "neox" / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# license: mit\n")
    done = run_command("convert", "gpt-neox", "native", tmp_path / "neox", tmp_path / "native")
    assert done.code == 0
    assert "attention_bias is false" in done.out
    assert "model.safetensors`, SHA-256" in (tmp_path / "native" / "README.md").read_text()
    back = run_command("convert", "native", "gpt-neox", tmp_path / "native", tmp_path / "back")
    assert (back.code, "Next:" in back.out) == (0, False)
    card = (tmp_path / "back" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "\nlicense: apache-2.0\n" in card
    assert "tokenformer.load_model" not in card
