"""The hash of a model's weights."""

from pathlib import Path

import torch

from tokenformer.models.directory import load_model, save_model
from tokenformer.models.fingerprint import weights_sha256


def test_it_follows_the_weights_alone(make_tokenformer, tmp_path: Path) -> None:
    model = make_tokenformer(seed=1)
    whole = save_model(model, tmp_path / "whole", card="one")
    parts = save_model(model, tmp_path / "parts", card="two", max_shard_size=2000)
    assert len(list(parts.glob("*.safetensors"))) > 1
    assert weights_sha256(whole) == weights_sha256(parts) == weights_sha256(str(whole))


def test_one_bit_and_the_dtype_count(make_tokenformer, tmp_path: Path) -> None:
    model = make_tokenformer(seed=1)
    before = weights_sha256(save_model(model, tmp_path / "a"))
    narrow = load_model(tmp_path / "a", dtype=torch.bfloat16)
    assert weights_sha256(save_model(narrow, tmp_path / "b")) != before
    with torch.no_grad():
        model.norm.bias[3] = torch.nextafter(model.norm.bias[3], torch.tensor(torch.inf))
    assert weights_sha256(save_model(model, tmp_path / "c")) != before
