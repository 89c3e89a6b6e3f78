"""Adapters on models that transformers loaded, and merged into such models."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tokenformer.huggingface  # noqa: F401
from tokenformer import (
    generate,
    grow,
    load_adapter,
    load_model,
    merge_adapters,
    save_adapter,
    without_adapters,
)
from tokenformer.adapters.apply import load_with_adapters, remove_adapters
from tokenformer.errors import TokenFormerError
from tokenformer.generation.config import SamplingConfig
from tokenformer.interop.native import native_to_native

GREEDY = SamplingConfig(temperature=0.0)
PROMPT = torch.tensor([[5, 200, 0, 39, 12]])


@pytest.fixture(scope="module")
def base(directories: dict[str, Path]) -> Path:
    return directories["tokenformer"]


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    grown = grow(load_model(base), qkv=9, proj=5, ffn=17, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in grown.named_parameters():
            if name.endswith("tokens.1"):
                parameter.normal_(0.0, 0.5, generator=generator)
    return save_adapter(grown, tmp_path_factory.mktemp("adapter") / "mine", base=base)


def continued(model: object) -> list[int]:
    found = model.generate(PROMPT, max_new_tokens=8, do_sample=False)  # type: ignore[attr-defined]
    return found[0, PROMPT.shape[1] :].tolist()


def test_on_a_model_of_transformers(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        before = model(PROMPT).logits
        load_adapter(model.language_model, adapter)
        after = model(PROMPT).logits
        expected = load_with_adapters(base, [adapter])
        assert torch.equal(after, expected(PROMPT).logits)
        assert not torch.allclose(after, before)
        with without_adapters(model.language_model):
            assert torch.equal(model(PROMPT).logits, before)
    assert (
        continued(model)
        == generate(expected, PROMPT.tolist(), max_new_tokens=8, sampling=GREEDY, vocab_size=257)[0]
    )

    with pytest.raises(TokenFormerError, match=r"an adapter is on top .*merge_adapters"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    merge_adapters(model.language_model, consolidate=False)
    model.save_pretrained(tmp_path / "saved")
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), load_model(tmp_path / "saved")):
        with torch.no_grad():
            assert torch.equal(again(PROMPT).logits, after)


def test_taken_off_before_saving(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(model.language_model, adapter)
    remove_adapters(model.language_model)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "saved")(PROMPT).logits, load_model(base)(PROMPT).logits)


@pytest.mark.parametrize("consolidate", [False, True])
def test_merged_by_convert(base: Path, adapter: Path, consolidate: bool, tmp_path: Path) -> None:
    native_to_native(base, tmp_path / "merged", adapters=[adapter], consolidate=consolidate)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = load_with_adapters(base, [adapter])
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, expected(PROMPT).logits, rtol=1e-5, atol=1e-5)
    assert (
        continued(model)
        == generate(expected, PROMPT.tolist(), max_new_tokens=8, sampling=GREEDY, vocab_size=257)[0]
    )
