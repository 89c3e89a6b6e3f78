"""``tokenformer convert`` as users run it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenformer.language.tokenizers import ByteTokenizer
from tokenformer.models.directory import load_model, save_model

CONFIG: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "qkv_slot_num": 3,
    "proj_slot_num": 5,
    "ffn_slot_num": 6,
    "seq_length": 16,
    "rotary_pct": 1.0,
    "norm_activation_type": "softmax",
    "padded_vocab_size": 384,
    "layernorm_epsilon": 1e-5,
    "tied": True,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    from tokenformer.interop.official import tensor_map
    from tokenformer.interop.official_config import OfficialConfig

    source = tmp_path / "official"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    shapes = {key: ours.shape for key, ours in tensor_map(OfficialConfig(**CONFIG)).items()}
    torch.save({key: torch.randn(shape) for key, shape in shapes.items()}, source / "pytorch_model.bin")
    return source


def test_what_was_converted_is_printed_and_usable(run_command, source: Path, tmp_path: Path) -> None:
    ByteTokenizer().save(source)
    done = run_command("convert", "official", "native", source, tmp_path / "native")
    assert (done.code, done.err) == (0, "")
    model = load_model(tmp_path / "native")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"TokenFormer, {parameters:,} parameters, context 16" in done.out
    assert "13 tensors (float32) mapped, none left over; tokenizer.json copied" in done.out
    assert (tmp_path / "native" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert "official" in (tmp_path / "native" / "README.md").read_text()
    again = run_command("generate", tmp_path / "native", "--prompt", "a", "--max-new-tokens", 3)
    assert again.code == 0


def test_without_a_tokenizer(run_command, source: Path, tmp_path: Path) -> None:
    done = run_command("convert", "official", "native", source, tmp_path / "native")
    assert done.code == 0
    assert "no tokenizer.json in the source" in done.out
    assert not (tmp_path / "native" / "tokenizer.json").exists()


def test_a_tokenizer_larger_than_the_vocabulary(run_command, source: Path, tmp_path: Path) -> None:
    ByteTokenizer().save(source)
    (source / "config.json").write_text(json.dumps({**CONFIG, "padded_vocab_size": 128}))
    done = run_command("convert", "official", "native", source, tmp_path / "native")
    assert (done.code, done.out) == (2, "")
    assert "has 257 tokens, but padded_vocab_size is 128" in done.err


def test_wrong_input(run_command, source: Path, tmp_path: Path) -> None:
    unknown = run_command("convert", "official", "gguf", source, tmp_path / "native")
    assert (unknown.code, unknown.out) == (2, "")
    assert "official to gguf is not offered; known: official to native" in unknown.err
    (source / "pytorch_model.bin").write_bytes(b"broken")
    damaged = run_command("convert", "official", "native", source, tmp_path / "native")
    assert damaged.code == 2
    assert "pytorch_model.bin: damaged" in damaged.err
    missing = run_command("convert", "official", "native", tmp_path / "absent", tmp_path / "native")
    assert missing.code == 2
    assert "config.json: no such file" in missing.err
    taken = run_command("convert", "official", "native", source, source)
    assert taken.code == 2
    assert "already there" in taken.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["official"]


def test_there_and_back(run_command, source: Path, tmp_path: Path) -> None:
    ByteTokenizer().save(source)
    assert run_command("convert", "official", "native", source, tmp_path / "native").code == 0
    done = run_command("convert", "native", "official", tmp_path / "native", tmp_path / "back")
    assert (done.code, done.err) == (0, "")
    assert "13 tensors (float32) mapped, none left over; tokenizer.json copied" in done.out
    assert "Next:" not in done.out
    first, again = (
        torch.load(directory / "pytorch_model.bin", weights_only=True)
        for directory in (source, tmp_path / "back")
    )
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_grown_model_says_what_was_rewritten(run_command, source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text(json.dumps({**CONFIG, "norm_activation_type": "l2_norm_gelu"}))
    assert run_command("convert", "official", "native", source, tmp_path / "native").code == 0
    assert run_command("grow", tmp_path / "native", "--out", tmp_path / "grown", "--factor", 2).code == 0
    done = run_command("convert", "native", "official", tmp_path / "grown", tmp_path / "back")
    assert done.code == 0
    assert "qkv: tau 3 is not n = 6, so 8 parameter tokens were appended to each layer" in done.out
    back = run_command("convert", "official", "native", tmp_path / "back", tmp_path / "again")
    assert back.code == 0


def test_what_the_authors_code_cannot_compute(run_command, make_tokenformer, tmp_path: Path) -> None:
    save_model(make_tokenformer(norm_activation="gelu"), tmp_path / "native")
    done = run_command("convert", "native", "official", tmp_path / "native", tmp_path / "back")
    assert (done.code, done.out) == (2, "")
    assert "norm_activation 'gelu': the authors' code has no weight function without a norm" in done.err
    assert not (tmp_path / "back").exists()


def test_a_yaml_configuration_by_name(run_command, source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    sizes = {name: value for name, value in CONFIG.items() if name not in ("padded_vocab_size", "tied")}
    text = json.dumps({**sizes, "pos_emb": "rotary", "norm": "layernorm_nonparam"})
    (tmp_path / "150M_eval.yml").write_text(text)
    without = run_command("convert", "official", "native", source, tmp_path / "native")
    assert (without.code, without.out) == (2, "")
    assert "a YAML file such as 150M_eval.yml beside it, or one named with --config" in without.err
    config = ("--config", tmp_path / "150M_eval.yml")
    done = run_command("convert", "official", "native", source, tmp_path / "native", *config)
    assert (done.code, done.err) == (0, "")
    assert "`150M_eval.yml`" in (tmp_path / "native" / "README.md").read_text()
    back = run_command("convert", "native", "official", tmp_path / "native", tmp_path / "back", *config)
    assert (back.code, back.out) == (2, "")
    assert "--config: native to official reads the configuration in the source alone" in back.err
    absent = run_command("convert", "official", "native", source, tmp_path / "x", "--config", "absent.yml")
    assert absent.code == 2
    assert "absent.yml: no such file" in absent.err
