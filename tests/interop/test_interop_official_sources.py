"""What an authors' checkpoint can be: YAML configurations, DeepSpeed files, shards, safetensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.interop.official import official_to_native
from tokenformer.models.directory import load_model
from tokenformer.models.registry import load_config
from tokenformer.models.tokenformer.config import TokenFormerConfig

# As the authors' files are: JSON with comments, Python's False, names with hyphens, settings of the run.
YAML = """{
  "pipe_parallel_size": 1,
  "num_layers": 2,
  "hidden-size": 16,
  "num_attention_heads": 2,
  "qkv_slot_num": 5,
  "proj-slot-num": 6,
  "ffn_slot_num": 7,
  "seq_length": 32,
  "max_position_embeddings": 32,
  "pos_emb": "rotary",
  "rotary_pct": 0.5,
  "no_weight_tying": false,
  "norm": "layernorm_nonparam",
  "final_norm": "layernorm",
  "gpt_j_residual": false,

  "attention_config": [[["tokenformer"], 2]],
  "norm_activation_type": "l2_norm_gelu", # "l2_norm_gelu", "gelu_l2_norm", "softmax"
  "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1.0e-8}},
  "checkpoint_validation_with_forward_pass": False,
  "tokenizer-type": "HFTokenizer",
}
"""


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"sequential.0.word_embeddings.weight": (128, 16)}
    for block in (2, 3):
        tokens = {
            "attention.query": 5,
            "attention.key": 5,
            "attention.value": 5,
            "attention.proj": 6,
            "mlp": 7,
        }
        for name, n in tokens.items():
            shapes |= {f"sequential.{block}.{name}.{kind}_param_tokens": (n, 16) for kind in ("key", "value")}
    shapes |= {"sequential.5.norm.weight": (16,), "sequential.5.norm.bias": (16,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with a YAML configuration and no weights yet."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "150M_eval.yml").write_text(YAML)
    return tmp_path / "source"


def assert_read(source: Path, expected: dict[str, Tensor]) -> None:
    target = source.parent / "model"
    converted = official_to_native(source, target)
    assert converted.tensors == len(expected)
    state = load_model(target).state_dict()
    assert torch.equal(state["embedding.weight"], expected["sequential.0.word_embeddings.weight"].float())
    found = state["blocks.1.ffn.value_tokens.0"]
    assert torch.equal(found, expected["sequential.3.mlp.value_param_tokens"].float())


def test_a_yaml_configuration_beside_the_weights(source: Path) -> None:
    torch.save(weights(), source / "pytorch_model.bin")
    assert_read(source, weights())
    config = load_config(source.parent / "model")
    assert isinstance(config, TokenFormerConfig)
    assert (config.vocab_size, config.max_position_embeddings, config.rotary_pct) == (128, 32, 0.5)
    assert (config.qkv_param_tokens, config.proj_param_tokens, config.ffn_param_tokens) == (5, 6, 7)
    assert (config.norm_activation, config.layer_norm_eps) == ("l2_norm_gelu", 1e-5)


def test_what_a_yaml_leaves_out_has_gpt_neox_defaults(source: Path) -> None:
    torch.save(weights(), source / "pytorch_model.bin")
    (source / "150M_eval.yml").write_text(YAML.replace('  "rotary_pct": 0.5,\n', ""))
    official_to_native(source, source.parent / "model")
    assert load_config(source.parent / "model").rotary_pct == 1.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"pos_emb": "rotary"', '"pos_emb": "learned"', "pos_emb: found 'learned'; expected 'rotary'"),
        ('  "pos_emb": "rotary",\n', "", "pos_emb: missing; expected 'rotary'"),
        ("layernorm_nonparam", "rmsnorm", "norm: found 'rmsnorm'; expected 'layernorm_nonparam'"),
        (
            '"no_weight_tying": false',
            '"no-weight-tying": true',
            "no_weight_tying: found True; expected False",
        ),
        ('"gpt_j_residual": false', '"gpt_j_residual": true', "gpt_j_residual: found True"),
        ('[[["tokenformer"], 2]]', '[[["tokenformer", "flash"], 1]]', "attention_config: found flash"),
        ('"seq_length": 32,', '"seq_length": 32, "seq-length": 64,', "seq_length: given twice, as 32 and 64"),
        ('"qkv_slot_num": 5,', "", "qkv_slot_num: missing, but required"),
        ('"qkv_slot_num": 5,', '"qkv_slot_num": "five",', "qkv_slot_num: found 'five'"),
        ('"num_layers": 2,', '"num_layers": 2', "invalid YAML at line 4"),
        (YAML, "- a\n", "found a list, expected a mapping"),
    ],
)
def test_wrong_yaml(source: Path, old: str, new: str, message: str) -> None:
    torch.save(weights(), source / "pytorch_model.bin")
    assert old in YAML
    (source / "150M_eval.yml").write_text(YAML.replace(old, new))
    with pytest.raises(TokenFormerError, match=r"150M_eval\.yml") as caught:
        official_to_native(source, source.parent / "model")
    assert message in str(caught.value)


def test_several_yaml_files_need_a_name(source: Path) -> None:
    torch.save(weights(), source / "pytorch_model.bin")
    (source / "configs").mkdir()
    (source / "configs" / "local_setup.yml").write_text("{}")
    with pytest.raises(
        TokenFormerError, match=r"2 configurations \(150M_eval.yml, configs/local_setup.yml\)"
    ):
        official_to_native(source, source.parent / "model")
    official_to_native(source, source.parent / "model", config=source / "150M_eval.yml")


def test_a_yaml_does_not_hide_a_wrong_embedding(source: Path) -> None:
    broken = weights() | {"sequential.0.word_embeddings.weight": torch.zeros(())}
    torch.save(broken, source / "pytorch_model.bin")
    with pytest.raises(TokenFormerError, match="padded_vocab_size: missing"):
        official_to_native(source, source.parent / "model")


def _bin(directory: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, directory / "pytorch_model.bin")


def _module_prefix(directory: Path, tensors: dict[str, Tensor]) -> None:
    torch.save({f"module.{key}": tensor for key, tensor in tensors.items()}, directory / "pytorch_model.bin")


def _deepspeed(directory: Path, tensors: dict[str, Tensor]) -> None:
    content: dict[str, Any] = {"module": {key: t.half() for key, t in tensors.items()}, "global_steps": 5}
    torch.save(content | {"mp_world_size": 1, "lr_scheduler": None}, directory / "mp_rank_00_model_states.pt")


def _safetensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors")


def _sharded(directory: Path, tensors: dict[str, Tensor], suffix: str) -> None:
    stem, extension = suffix.split(".")
    names = list(tensors)
    shards = {
        f"{stem}-0000{number}-of-00002.{extension}": {name: tensors[name] for name in part}
        for number, part in enumerate((names[:9], names[9:]), 1)
    }
    for shard, part in shards.items():
        save_file(part, directory / shard) if extension == "safetensors" else torch.save(
            part, directory / shard
        )
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (directory / f"{suffix}.index.json").write_text(json.dumps(index))


def _sharded_bin(directory: Path, tensors: dict[str, Tensor]) -> None:
    _sharded(directory, tensors, "pytorch_model.bin")


def _sharded_safetensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    _sharded(directory, tensors, "model.safetensors")


@pytest.mark.parametrize(
    "write",
    [_bin, _module_prefix, _safetensors, _sharded_bin, _sharded_safetensors],
    ids=lambda f: f.__name__,
)
def test_every_kind_of_file(source: Path, write: Any) -> None:
    write(source, weights())
    assert_read(source, weights())


def test_the_module_of_a_deepspeed_checkpoint(source: Path) -> None:
    _deepspeed(source, weights())
    assert_read(source, {key: tensor.half() for key, tensor in weights().items()})


def test_provenance_in_the_card(source: Path) -> None:
    _sharded_bin(source, weights())
    official_to_native(source, source.parent / "model")
    card = (source.parent / "model" / "README.md").read_text()
    for expected in ("150M_eval.yml", "pytorch_model-00002-of-00002.bin`, SHA-256", "| source | source |"):
        assert expected in card


def test_a_missing_and_a_strange_shard(source: Path) -> None:
    _sharded_bin(source, weights())
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(TokenFormerError, match=r"00002-of-00002\.bin: missing, but named in pytorch_model"):
        official_to_native(source, source.parent / "model")
    index = {"weight_map": {"a": "../outside.bin"}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(TokenFormerError, match="lies outside the model directory"):
        official_to_native(source, source.parent / "model")


def test_a_tensor_in_two_shards(source: Path) -> None:
    _sharded_bin(source, weights())
    torch.save(weights(), source / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(TokenFormerError, match="also in another file of the same weights"):
        official_to_native(source, source.parent / "model")


def test_parts_of_a_model_are_refused(source: Path) -> None:
    for rank in range(2):
        torch.save({"module": {}}, source / f"mp_rank_0{rank}_model_states.pt")
    with pytest.raises(TokenFormerError, match=r"2 files .* split over tensor-parallel ranks"):
        official_to_native(source, source.parent / "model")


class _Unknown:
    pass


def test_a_deepspeed_file_with_objects_names_the_way_out(source: Path) -> None:
    torch.save({"module": weights(), "args": _Unknown()}, source / "mp_rank_00_model_states.pt")
    with pytest.raises(TokenFormerError, match=r"zero_to_fp32\.py.* writes a plain pytorch_model\.bin"):
        official_to_native(source, source.parent / "model")


def test_a_pipeline_checkpoint_names_the_way_out(source: Path) -> None:
    torch.save({}, source / "layer_00-model_00-model_states.pt")
    with pytest.raises(TokenFormerError, match="convert a pipeline checkpoint to one state dict first"):
        official_to_native(source, source.parent / "model")


def test_stored_rotary_frequencies_are_compared(source: Path) -> None:
    frequencies = 10000.0 ** -(torch.arange(0, 4, 2) / 4)  # rotary_dim 4: half of 8 head features
    stored = {f"sequential.{block}.attention.rotary_emb.inv_freq": frequencies.half() for block in (2, 3)}
    _bin(source, weights() | stored)
    assert_read(source, weights())
    stored["sequential.3.attention.rotary_emb.inv_freq"] = frequencies * 2
    _bin(source, weights() | stored)
    with pytest.raises(TokenFormerError, match=r"sequential\.3\.attention\.rotary_emb\.inv_freq: not what"):
        official_to_native(source, source.parent / "other")
