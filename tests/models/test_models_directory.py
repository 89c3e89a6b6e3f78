"""Model directories: bit for bit there and back, nothing half-written, and damage is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenformer import TokenFormerError, load_model, save_model
from tokenformer.growth.grow import grow
from tokenformer.models.base import LanguageModel


def assert_same(found: LanguageModel, expected: LanguageModel) -> None:
    assert type(found) is type(expected)
    assert found.config == expected.config
    states = found.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype
        assert torch.equal(tensor.view(torch.uint8), states[1][name].view(torch.uint8)), name
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)


@pytest.fixture
def saved(make_tokenformer: Callable[..., LanguageModel], tmp_path: Path) -> Path:
    return save_model(make_tokenformer(), tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(any_model: LanguageModel, dtype: torch.dtype, tmp_path: Path) -> None:
    model = copy.deepcopy(any_model).to(dtype)
    assert save_model(model, tmp_path / "model") == tmp_path / "model"
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "configuration_tokenformer.py",
        "model.safetensors",
        "modeling_tokenformer.py",
    ]
    loaded = load_model(tmp_path / "model")
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    assert_same(loaded, model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_grown_model_keeps_groups_tau_and_history(make_tokenformer, tmp_path: Path) -> None:
    model = grow(grow(make_tokenformer(), factor=2.0), factor=2.0, init="copies")
    loaded = load_model(save_model(model, tmp_path / "model"))
    assert_same(loaded, model)
    assert loaded.blocks[0].ffn.groups == (12, 12, 12, 12)
    assert loaded.blocks[0].ffn.tau == model.blocks[0].ffn.tau == 24.0
    assert [step.init for step in loaded.config.growth_history] == ["exact", "copies"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert "1. Grown (`exact`) to 12 / 10 / 24 tokens" in card
    assert "12 + 12 + 12 + 12" in card


def test_loads_in_another_dtype(saved: Path) -> None:
    original, narrow = load_model(saved), load_model(saved, dtype=torch.bfloat16)
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[name].bfloat16())


def test_shards(make_tokenformer, tmp_path: Path) -> None:
    model = make_tokenformer()
    path = save_model(model, tmp_path / "model", max_shard_size=2000)
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert not (path / "model.safetensors").exists()
    assert_same(load_model(path), model)
    (path / shards[1]).unlink()
    with pytest.raises(
        TokenFormerError, match=rf"{shards[1]}: missing, but named in model.safetensors.index.json"
    ):
        load_model(path)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/stolen.safetensors", "sub/part.safetensors"])
def test_a_shard_outside_the_directory_is_refused(make_tokenformer, name: str, tmp_path: Path) -> None:
    path = save_model(make_tokenformer(), tmp_path / "model", max_shard_size=2000)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TokenFormerError, match="lies outside the model directory"):
        load_model(path)


@pytest.mark.parametrize("index", ['{"weight_map": {}}', "{}", '{"weight_map": ["a"]}', "[]", "{"])
def test_a_broken_index(saved: Path, index: str) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(TokenFormerError, match=r"model\.safetensors\.index\.json: "):
        load_model(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(saved: Path, keep: int) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(TokenFormerError, match=r"model\.safetensors: not a whole safetensors file"):
        load_model(saved)


def test_garbage_as_weights(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"\x93NUMPY" * 500)
    with pytest.raises(TokenFormerError, match="not a whole safetensors file"):
        load_model(saved)


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("norm.bias"), "the weights do not fit config.json; missing tensors: norm.bias"),
        (lambda t: t.update(extra=torch.zeros(2)), "unexpected tensors: extra"),
        (
            lambda t: t.update({"norm.bias": torch.zeros(3)}),
            r"wrong shapes: norm.bias: found \[3\], expected \[16\]",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.0")],
            "missing tensors: .* and 4 more",
        ),
        (
            lambda t: t.update({"norm.bias": torch.zeros(16, dtype=torch.int64)}),
            "norm.bias: found int64 numbers, expected floats",
        ),
    ],
)
def test_weights_of_another_model(saved: Path, edit: Callable[..., object], message: str) -> None:
    change(saved, edit)
    with pytest.raises(TokenFormerError, match=message):
        load_model(saved)


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(
        TokenFormerError, match=r"found neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        load_model(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(TokenFormerError, match=r"config.json: invalid JSON at line 1, column 2"):
        load_model(saved)
    with pytest.raises(
        TokenFormerError, match=r"nowhere/config.json: no such file; expected the configuration"
    ):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_a_device_that_is_not_there(saved: Path, device: str) -> None:
    with pytest.raises(TokenFormerError, match=f"device: '{device}' cannot be used"):
        load_model(saved, device=device)


def test_an_output_with_content_is_refused_and_stays(saved: Path, make_transformer) -> None:
    with pytest.raises(TokenFormerError, match="a directory with content is already there"):
        save_model(make_transformer(), saved)
    assert load_model(saved).config.architecture == "tokenformer"
    save_model(make_transformer(), saved, replace=True)
    assert load_model(saved).config.architecture == "transformer"


@pytest.mark.parametrize("failing", ["write_text", "save"])
def test_a_failure_leaves_the_old_model_and_nothing_else(
    saved: Path, make_transformer, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    class Tokenizer:
        save = disk_full

    if failing == "write_text":
        monkeypatch.setattr("tokenformer.models.directory.write_text", disk_full)
    tokenizer = Tokenizer() if failing == "save" else None
    for target, replace in ((saved, True), (saved.parent / "new", False)):
        with pytest.raises(TokenFormerError, match=r"could not be written .No space left on device"):
            save_model(make_transformer(), target, tokenizer=tokenizer, replace=replace)
    assert load_model(saved).config.architecture == "tokenformer"
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_failed_exchange_puts_the_old_model_back(
    saved: Path, make_transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail_for_scratch(path: Path, target: Path) -> Path:
        if "incomplete" in path.name:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(
        "tokenformer.files._exchange", lambda *_: False
    )  # as where no single step can swap two
    monkeypatch.setattr(Path, "rename", fail_for_scratch)
    with pytest.raises(TokenFormerError, match="Input/output error"):
        save_model(make_transformer(), saved, replace=True)
    assert load_model(saved).config.architecture == "tokenformer"
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_tokenizer_and_card(make_tokenformer, tmp_path: Path) -> None:
    tokenizer = tmp_path / "some.json"
    tokenizer.write_text('{"model": "é"}')
    path = save_model(make_tokenformer(), tmp_path / "model", tokenizer=tokenizer, card="# Mine\n")
    assert (path / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert (path / "README.md").read_text() == "# Mine\n"
    with pytest.raises(TokenFormerError, match=r"missing.json: no such file; expected a tokenizer.json"):
        save_model(make_tokenformer(), tmp_path / "other", tokenizer=tmp_path / "missing.json")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("action", ["grow", "remove", "consolidate"])
def test_a_layer_that_left_its_configuration_is_not_written(
    make_tokenformer, action: str, tmp_path: Path
) -> None:
    model = grow(make_tokenformer(), factor=2.0)
    layer = model.blocks[0].ffn
    {"grow": lambda: layer.grow(30), "remove": lambda: layer.remove(1), "consolidate": layer.consolidate}[
        action
    ]()
    with pytest.raises(TokenFormerError, match=r"do not fit the model's configuration; .*blocks\.0\.ffn"):
        save_model(model, tmp_path / "model")
    assert not any(tmp_path.iterdir())
