"""Evaluation of directories against a plain float64 computation."""

import json
import math
from pathlib import Path

import pytest
import torch

from tokenformer.errors import TokenFormerError
from tokenformer.evaluation.perplexity import evaluate_model
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.prepare import prepare
from tokenformer.models.directory import load_model, save_model
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig

CONFIG = TokenFormerConfig(
    vocab_size=384,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    qkv_param_tokens=24,
    proj_param_tokens=16,
    ffn_param_tokens=40,
    max_position_embeddings=48,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataDirectory:
    folder = tmp_path_factory.mktemp("data")
    texts = [f"Document {i}: " + "größer, 一二三. " * (i % 7 + 1) for i in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    return prepare([folder / "text.jsonl"], folder / "out", validation_fraction=0.3)


@pytest.fixture(scope="module")
def model(data: DataDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "model"
    return save_model(build_model(CONFIG, seed=3), directory, tokenizer=data.tokenizer)


def reference_nats(model: Path, data: DataDirectory, split: str, length: int) -> float:
    """Every token but the first, window by window, one at a time, in float64."""
    network, store = load_model(model), data.split(split)
    tokens = torch.from_numpy(store.tokens(0, store.num_tokens).astype("int64"))
    nats = 0.0
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length + 1]
        with torch.no_grad():
            logits = network(window[None, :-1]).logits[0].double()
        nats -= logits.log_softmax(-1).gather(1, window[1:, None]).sum().item()
    return nats


@pytest.mark.parametrize(("split", "length"), [("validation", None), ("validation", 7), ("train", 20)])
def test_measures_of_the_whole_split(
    model: Path, data: DataDirectory, split: str, length: int | None
) -> None:
    result = evaluate_model(model, data.path, split=split, sequence_length=length)
    evaluation, store = result.evaluation, data.split(split)
    nats = reference_nats(model, data, split, length or 48)
    text_bytes = data.info.splits[split].utf8_bytes - 1  # type: ignore[index]  # the first token is a byte
    assert result.sequence_length == (length or 48)
    assert evaluation.tokens == store.num_tokens - 1
    assert evaluation.bytes == text_bytes
    assert evaluation.loss == pytest.approx(nats / (store.num_tokens - 1), rel=1e-6)
    assert evaluation.perplexity == pytest.approx(math.exp(nats / (store.num_tokens - 1)), rel=1e-5)
    assert evaluation.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)


def test_the_result_does_not_depend_on_the_batch_size(model: Path, data: DataDirectory) -> None:
    losses = [evaluate_model(model, data.path, batch_size=size).evaluation.loss for size in (1, 2, 3, 5, 64)]
    assert max(losses) - min(losses) < 1e-6


def test_json_of_a_result(model: Path, data: DataDirectory) -> None:
    result = evaluate_model(model, data.path)
    values = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert values["loss"] == result.evaluation.loss
    assert (values["split"], values["tokens"]) == ("validation", result.evaluation.tokens)
    hopeless = result._replace(evaluation=result.evaluation._replace(nats=1e9))
    assert hopeless.to_json()["perplexity"] is None


def test_a_run_directory_stands_for_its_model(model: Path, data: DataDirectory, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(model)
    in_run = evaluate_model(tmp_path / "run", data.path)
    assert in_run.model == tmp_path / "run" / "model"
    assert in_run.evaluation == evaluate_model(model, data.path).evaluation


def test_data_of_another_tokenizer_is_refused(model: Path, data: DataDirectory, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("one two three four five\n" * 40)
    other = prepare([source], tmp_path / "other", tokenizer="bpe:300")
    with pytest.raises(TokenFormerError, match="not the model's"):
        evaluate_model(model, other.path)


def test_wrong_arguments(model: Path, data: DataDirectory, tmp_path: Path) -> None:
    with pytest.raises(TokenFormerError, match="sequence_length is 49, expected 1 to 48"):
        evaluate_model(model, data.path, sequence_length=49)
    with pytest.raises(TokenFormerError, match="batch_size is 0"):
        evaluate_model(model, data.path, batch_size=0)
    with pytest.raises(TokenFormerError, match="no split 'test'"):
        evaluate_model(model, data.path, split="test")
    with pytest.raises(TokenFormerError, match="no such directory"):
        evaluate_model(tmp_path / "absent", data.path)
    with pytest.raises(TokenFormerError, match="expected a data directory"):
        evaluate_model(model, tmp_path / "absent")


def test_weights_that_are_not_numbers_are_reported(data: DataDirectory, tmp_path: Path) -> None:
    network = build_model(CONFIG)
    with torch.no_grad():
        network.norm.weight.fill_(float("nan"))  # type: ignore[operator, union-attr]
    damaged = save_model(network, tmp_path / "model", tokenizer=data.tokenizer)
    with pytest.raises(TokenFormerError, match="not finite"):
        evaluate_model(damaged, data.path)
