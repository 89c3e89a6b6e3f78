"""The language modelling task: batches, loss, scores against plain formulas."""

from __future__ import annotations

import json
import math
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import tokenizers
import torch

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.data_mixture import DataMixture
from tokenformer.language.prepare import prepare
from tokenformer.language.scoring import Evaluation, score
from tokenformer.language.task import LanguageModelingTask, Packing
from tokenformer.models.base import LanguageModel
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig

TEXTS = [f"Résumé {i} 😀: " + "the cat and the hat " * (1 + i % 4) for i in range(40)]


def config(vocab_size: int = 384, **changes: object) -> TokenFormerConfig:
    fields: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "qkv_param_tokens": 16,
        "proj_param_tokens": 16,
        "ffn_param_tokens": 32,
        "logit_scale": 1.5,
    }
    return TokenFormerConfig.model_validate({"architecture": "tokenformer"} | fields | changes)


@pytest.fixture(scope="module", params=["byte", "bpe:300"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataDirectory:
    folder = tmp_path_factory.mktemp("task")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return prepare([folder / "a.jsonl"], folder / "data", tokenizer=request.param, validation_fraction=0.3)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build_model(config(), seed=3)


def plain_nats(model: LanguageModel, tokens: torch.Tensor, t: int) -> float:
    """Every token but the first, window by window, from all logits in float64."""
    total = 0.0
    for start in range(0, len(tokens) - 1, t):
        window = tokens[start : start + t + 1]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0].double()
        total -= torch.log_softmax(logits, -1)[torch.arange(len(window) - 1), window[1:]].sum().item()
    return total


def stream(data: DataDirectory, split: str) -> torch.Tensor:
    store = data.split(split)
    return torch.tensor(store.tokens(0, store.num_tokens).tolist())


def scored_text_bytes(data: DataDirectory, tokens: torch.Tensor) -> int:
    """Bytes behind tokens 1, 2, ...: a byte-level token has one character for each."""
    backend = tokenizers.Tokenizer.from_file(str(data.path / "tokenizer.json"))
    ids = [id for id in tokens[1:].tolist() if id != data.tokenizer.eos_token_id]
    return sum(len(backend.id_to_token(id) or "") for id in ids)


def test_batches_are_the_samples_as_tensors(data: DataDirectory) -> None:
    task = LanguageModelingTask(data, 8, seed=5)
    with closing(task.batches(lambda k: range(1000 + 3 * k, 1003 + 3 * k))) as batches:
        for number, batch in enumerate(islice(batches, 2)):
            assert batch.inputs.shape == batch.targets.shape == (3, 8)
            assert batch.inputs.dtype == batch.targets.dtype == torch.int64
            assert batch.documents is None
            expected = task.samples.read(range(1000 + 3 * number, 1003 + 3 * number))
            assert torch.equal(batch.inputs, torch.from_numpy(expected.inputs))
            assert torch.equal(batch.targets, torch.from_numpy(expected.targets))
            assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert task.counters() == {}


def test_packed_documents_come_with_their_documents(data: DataDirectory) -> None:
    task = LanguageModelingTask(data, 64, seed=5, packing="documents")
    with closing(task.batches(lambda k: range(3 * k, 3 * k + 3))) as batches:
        batch = next(batches)
    assert batch.documents is not None
    assert batch.documents.shape == (3, 64)
    assert torch.equal(batch.documents == -1, batch.targets == -100)
    real = batch.documents != -1
    assert (batch.inputs[real] != data.tokenizer.eos_token_id).all(), "an end is predicted, never read"


def test_the_loss_is_the_sum_over_targets_and_its_gradient_that_of_all_logits(
    data: DataDirectory, model: LanguageModel
) -> None:
    task = LanguageModelingTask(data, 8, seed=5)
    batch = next(task.batches(lambda k: range(4 * k, 4 * k + 4)))
    batch.targets[0, :3] = -100
    loss = task.loss(model, batch)
    assert loss.nats.dtype == torch.float32
    assert int(loss.count) == 29
    model.zero_grad()
    loss.nats.backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    logits = model(batch.inputs).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"
    )
    expected.backward()
    torch.testing.assert_close(loss.nats, expected, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_scores_are_those_of_the_plain_formula_for_any_batch_size(
    data: DataDirectory, model: LanguageModel
) -> None:
    tokens = stream(data, "validation")
    expected = plain_nats(model, tokens, 10)
    found = [
        score(model, data, sequence_length=10, batch_size=size, device="cpu") for size in (1, 3, 16, 10_000)
    ]
    for evaluation in found:
        assert evaluation.tokens == len(tokens) - 1
        assert evaluation.nats == pytest.approx(expected, rel=1e-6)
        assert evaluation.loss == pytest.approx(found[0].loss, rel=1e-6)
        assert evaluation.bytes == scored_text_bytes(data, tokens)
        assert evaluation.bytes < data.info.splits["validation"].utf8_bytes
        assert evaluation.bits_per_byte == pytest.approx(expected / math.log(2) / evaluation.bytes, rel=1e-6)
        assert evaluation.perplexity == pytest.approx(math.exp(expected / (len(tokens) - 1)), rel=1e-5)


@pytest.mark.parametrize("limit", [1, 7, 10, 33, 100_000])
def test_a_part_of_a_split_counts_its_own_bytes(
    data: DataDirectory, model: LanguageModel, limit: int
) -> None:
    tokens = stream(data, "train")[: limit + 1]
    found = score(
        model, data, sequence_length=10, batch_size=4, device="cpu", split="train", max_tokens=limit
    )
    assert found.tokens == len(tokens) - 1
    assert found.nats == pytest.approx(plain_nats(model, tokens, 10), rel=1e-6)
    assert found.bytes == scored_text_bytes(data, tokens)


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_the_task_s_evaluation_is_the_score_of_plain_windows(
    data: DataDirectory, model: LanguageModel, packing: Packing
) -> None:
    task = LanguageModelingTask(data, 10, seed=0, packing=packing)
    evaluation = score(model, data, sequence_length=10, device="cpu", max_tokens=33)
    assert task.evaluate(model, torch.device("cpu"), max_tokens=33) == evaluation.metrics()
    assert list(evaluation.metrics()) == ["loss", "perplexity", "bits_per_byte"]


def test_a_mixture_is_evaluated_as_the_text_it_yields(model: LanguageModel, tmp_path: Path) -> None:
    parts = []
    for name, text in (("prose", "the cat and the hat "), ("code", "x = résumé(y) ")):
        lines = [json.dumps({"text": text * (1 + i % 5)}) + "\n" for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        parts.append(
            prepare([tmp_path / f"{name}.jsonl"], tmp_path / name, tokenizer="byte", validation_fraction=0.3)
        )
    mixture = DataMixture([(parts[0], 3), (parts[1], 1)])
    found = LanguageModelingTask(mixture, 10, seed=0).evaluate(model, "cpu")
    prose, code = (score(model, part, sequence_length=10, device="cpu") for part in parts)
    loss = 0.75 * prose.loss + 0.25 * code.loss
    assert found["loss/prose"] == pytest.approx(prose.loss)
    assert found["loss/code"] == pytest.approx(code.loss)
    assert found["loss"] == pytest.approx(loss)
    assert found["perplexity"] == pytest.approx(math.exp(loss))
    bytes_a_token = 0.75 * prose.bytes / prose.tokens + 0.25 * code.bytes / code.tokens
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / bytes_a_token)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode_and_without_gradients(
    data: DataDirectory, model: LanguageModel, training: bool
) -> None:
    model.train(training)
    model.zero_grad()
    score(model, data, sequence_length=10, batch_size=4, device="cpu")
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_measures_at_their_limits() -> None:
    assert Evaluation(0.0, 10, 0).bits_per_byte == math.inf
    assert Evaluation(1e6, 10, 10).perplexity == math.inf


def test_models_of_other_data_are_refused(data: DataDirectory) -> None:
    task = LanguageModelingTask(data, 8, seed=0)
    own, other = data.tokenizer.sha256, "0" * 64
    task.check_model(config(384), None)
    task.check_model(config(384), own)
    task.check_model(config(512), own)  # the same tokenizer in a model with more padding
    with pytest.raises(
        TokenFormerError, match=rf"hash {own[:16]}\) is not the model's \(hash 0000000000000000\)"
    ):
        task.check_model(config(384), other)
    with pytest.raises(
        TokenFormerError, match="vocab_size: the model has 512, expected 384 for the tokenizer of"
    ):
        task.check_model(config(512), None)
    with pytest.raises(TokenFormerError, match="vocab_size: the model has 256, expected 384"):
        task.check_model(config(256), own)


def test_impossible_requests_are_refused(data: DataDirectory, model: LanguageModel) -> None:
    with pytest.raises(TokenFormerError, match="sequence_length: found 0, expected at least 1"):
        LanguageModelingTask(data, 0, seed=0)
    with pytest.raises(TokenFormerError, match=r"train: holds \d+ tokens, expected at least 1000001"):
        LanguageModelingTask(data, 1_000_000, seed=0)
    with pytest.raises(TokenFormerError, match="max_tokens: found 0, expected at least 1"):
        score(model, data, sequence_length=8, batch_size=1, device="cpu", max_tokens=0)
    with pytest.raises(TokenFormerError, match="no split 'test'"):
        score(model, data, sequence_length=8, batch_size=1, device="cpu", split="test")
