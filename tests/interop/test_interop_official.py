"""The authors' checkpoints: golden cases, an independent float64 forward, and everything that can be wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from official_reference import Reference
from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.interop.formats import find_conversion
from tokenformer.interop.official import official_to_native, tensor_map
from tokenformer.interop.official_config import OfficialConfig
from tokenformer.models.base import LanguageModel
from tokenformer.models.directory import load_model
from tokenformer.models.registry import load_config
from tokenformer.models.tokenformer.config import TokenFormerConfig

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
CASES = ("a_l2_norm_gelu", "c_softmax")

ODD_SIZES: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 30,
    "num_attention_heads": 5,
    "qkv_slot_num": 7,
    "proj_slot_num": 11,
    "ffn_slot_num": 13,
    "seq_length": 32,
    "rotary_pct": 0.7,
    "norm_activation_type": "gelu_l2_norm",
    "padded_vocab_size": 128,
    "layernorm_epsilon": 1e-5,
    "tied": True,
}


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Names and shapes written out again here, so that the map itself is under test."""
    generator = torch.Generator().manual_seed(seed)
    d, layers = config["hidden_size"], config["num_layers"]
    shapes = {"sequential.0.word_embeddings.weight": (config["padded_vocab_size"], d)}
    for block in range(2, layers + 2):
        for name, n in [
            ("attention.query", config["qkv_slot_num"]),
            ("attention.key", config["qkv_slot_num"]),
            ("attention.value", config["qkv_slot_num"]),
            ("attention.proj", config["proj_slot_num"]),
            ("mlp", config["ffn_slot_num"]),
        ]:
            shapes[f"sequential.{block}.{name}.key_param_tokens"] = (n, d)
            shapes[f"sequential.{block}.{name}.value_param_tokens"] = (n, d)
    shapes[f"sequential.{layers + 3}.norm.weight"] = (d,)
    shapes[f"sequential.{layers + 3}.norm.bias"] = (d,)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_checkpoint(directory: Path, config: dict[str, Any], weights: dict[str, Any]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    torch.save(weights, directory / "pytorch_model.bin")
    return directory


def block_hidden(model: LanguageModel, tokens: Tensor) -> Tensor:
    """[L+1, b, t, d]: what enters the first block, then what leaves each one."""
    seen: list[Tensor] = []
    first = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rest = [block.register_forward_hook(lambda _, __, out: seen.append(out[0])) for block in model.blocks]
    model(tokens)
    for hook in (first, *rest):
        hook.remove()
    return torch.stack(seen)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden cases (../shared/golden) are not here")
@pytest.mark.parametrize("case", CASES)
def test_golden_case(case: str, tmp_path: Path) -> None:
    converted = find_conversion("official", "native")(GOLDEN / case, tmp_path / "model")
    model = load_model(converted.directory).eval()
    expected = np.load(GOLDEN / case / "expected.npz")
    tokens = torch.from_numpy(expected["input_ids"])
    with torch.no_grad():
        logits = model(tokens).logits
        close = {"logits": (logits, 1e-5), "final_hidden": (model.hidden(tokens), 3e-5)}
        close["block_hidden"] = (block_hidden(model, tokens), 3e-5)
        query: Any = model.blocks[0].attention.query
        close["pattention_output"] = (query(torch.from_numpy(expected["pattention_input"])), 3e-5)
    for name, (found, atol) in close.items():
        np.testing.assert_allclose(found.numpy(), expected[name], rtol=0, atol=atol, err_msg=name)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(float(expected["loss"]), abs=3e-5)


@pytest.mark.parametrize("kind", ["gelu_l2_norm", "l2_norm_gelu", "softmax"])
def test_odd_sizes_against_float64(kind: str, tmp_path: Path) -> None:
    config = {**ODD_SIZES, "norm_activation_type": kind}
    weights = random_weights(config)
    source = write_checkpoint(tmp_path / "source", config, weights)
    official_to_native(source, tmp_path / "model")
    model = load_model(tmp_path / "model").double().eval()
    tokens = [5, 17, 0, 127, 64, 5, 5, 90, 33, 2, 71]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    expected = Reference(config, weights).logits(tokens)
    assert np.abs(expected).max() > 1
    # Norms and softmax inside are float32, whatever the weights are.
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_configuration_is_translated(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", ODD_SIZES, random_weights(ODD_SIZES))
    converted = official_to_native(source, tmp_path / "model")
    config = load_config(tmp_path / "model")
    assert isinstance(config, TokenFormerConfig)
    assert config == converted.config
    assert (config.tau.qkv, config.tau.proj, config.tau.ffn) == (7, 11, 13)
    assert (config.gelu_approximate, config.norm_eps, config.max_position_embeddings) == ("none", 0, 32)
    assert config.num_parameters() == sum(t.numel() for t in random_weights(ODD_SIZES).values())
    assert converted.tensors == 3 + 10 * 3
    assert (tmp_path / "model" / "README.md").is_file()


def test_half_precision_weights_become_float32_unchanged(tmp_path: Path) -> None:
    weights = {key: tensor.half() for key, tensor in random_weights(ODD_SIZES).items()}
    source = write_checkpoint(tmp_path / "source", ODD_SIZES, weights)
    converted = official_to_native(source, tmp_path / "model")
    assert converted.dtype == "float16"
    state = load_model(tmp_path / "model").state_dict()
    assert torch.equal(state["embedding.weight"], weights["sequential.0.word_embeddings.weight"].float())


def test_every_wrong_key_and_shape_is_named(tmp_path: Path) -> None:
    weights = random_weights(ODD_SIZES)
    del weights["sequential.2.mlp.key_param_tokens"]
    weights["sequential.9.mlp.key_param_tokens"] = torch.zeros(2)
    weights["sequential.3.attention.proj.value_param_tokens"] = torch.zeros(7, 30)
    weights["sequential.0.word_embeddings.weight"] = torch.zeros(128, 30, dtype=torch.int64)
    weights["sequential.6.norm.bias"][3] = float("nan")
    source = write_checkpoint(tmp_path / "source", ODD_SIZES, weights)
    with pytest.raises(TokenFormerError) as caught:
        official_to_native(source, tmp_path / "model")
    message = str(caught.value)
    assert "1 keys missing: sequential.2.mlp.key_param_tokens" in message
    assert "1 keys not expected: sequential.9.mlp.key_param_tokens" in message
    assert "sequential.3.attention.proj.value_param_tokens: found shape [7, 30], expected [11, 30]" in message
    assert "sequential.0.word_embeddings.weight: found int64" in message
    assert "sequential.6.norm.bias: 1 of 30 weights are NaN or infinite" in message
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_activation_type": "gelu"}, "norm_activation_type"),
        ({"tied": False}, "tied"),
        ({"num_attention_heads": 7}, "num_attention_heads 7 does not divide hidden_size 30"),
        ({"rotary_pct": 0.5}, "expected an even number"),
        ({"ffn_slots": 3}, "ffn_slots: unknown field; did you mean 'ffn_slot_num'"),
        ({"hidden_size": "thirty"}, "hidden_size"),
    ],
)
def test_wrong_configuration(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {**ODD_SIZES, **change}, random_weights(ODD_SIZES))
    with pytest.raises(TokenFormerError, match=r"config\.json") as caught:
        official_to_native(source, tmp_path / "model")
    assert message in str(caught.value)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    config = {key: value for key, value in ODD_SIZES.items() if key != "seq_length"}
    source = write_checkpoint(tmp_path / "source", config, random_weights(ODD_SIZES))
    with pytest.raises(TokenFormerError, match="seq_length: missing"):
        official_to_native(source, tmp_path / "model")


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", ODD_SIZES, random_weights(ODD_SIZES))
    weights = source / "pytorch_model.bin"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint", whole[:100] + b"\0" * 4000):
        weights.write_bytes(content)
        with pytest.raises(TokenFormerError, match=r"pytorch_model\.bin: damaged"):
            official_to_native(source, tmp_path / "model")
    torch.save([1, 2], weights)
    with pytest.raises(TokenFormerError, match="found a list, expected a flat state dict"):
        official_to_native(source, tmp_path / "model")
    torch.save({"optimizer": {}}, weights)
    with pytest.raises(TokenFormerError, match="optimizer: found a dict, expected a tensor"):
        official_to_native(source, tmp_path / "model")
    weights.unlink()
    with pytest.raises(
        TokenFormerError, match=r"no weights: expected model\.safetensors.*found config\.json"
    ):
        official_to_native(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", ODD_SIZES, {})
    torch.save({"x": _Malicious(tmp_path / "ran")}, source / "pytorch_model.bin")
    with pytest.raises(TokenFormerError, match="damaged, or not a state dict of plain tensors"):
        official_to_native(source, tmp_path / "model")
    assert not (tmp_path / "ran").exists()


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_an_output_with_content_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("keep")
    with pytest.raises(TokenFormerError, match="already there"):
        official_to_native(tmp_path / "absent", tmp_path / "model")


def test_the_map_covers_every_tensor_of_the_model_once() -> None:
    from tokenformer.models.registry import build_model

    config = OfficialConfig(**ODD_SIZES)
    ours = {
        name: tuple(tensor.shape)
        for name, tensor in build_model(config.to_native("test")).state_dict().items()
    }
    mapped = list(tensor_map(config).values())
    assert {tensor.name: tensor.shape for tensor in mapped} == ours
    assert len(mapped) == len(ours)


def test_unknown_formats_name_the_known_ones() -> None:
    with pytest.raises(TokenFormerError, match="official to native"):
        find_conversion("gguf", "native")
