"""Evaluation of directories against a plain float64 computation."""

import json
import math
from pathlib import Path

import pytest
import torch

from tokenformer.errors import TokenFormerError
from tokenformer.evaluation.perplexity import count_words, evaluate_model
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.prepare import prepare
from tokenformer.models.base import LanguageModel
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
    with pytest.raises(TokenFormerError, match="stride: found 49, expected 1 to 48"):
        evaluate_model(model, data.path, stride=49)
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


def nats_of_texts(network: LanguageModel, texts: list[list[int]], length: int, stride: int) -> float:
    """One window after the other, in float64: the first scores all it holds, each other one what is new in it."""
    nats = 0.0
    for tokens in texts:
        scored = 0
        for start in range(0, len(tokens), stride):
            if scored == len(tokens) - 1:
                break
            window = tokens[start : start + length + 1]
            with torch.no_grad():
                logits = network(torch.tensor([window[:-1]])).logits[0].double()
            chosen = logits.log_softmax(-1).gather(1, torch.tensor(window[1:])[:, None])[:, 0]
            new = start + len(window) - 1 - scored
            nats -= chosen[-new:].sum().item()
            scored += new
    return nats


def test_a_sliding_window(model: Path, data: DataDirectory) -> None:
    store = data.split("validation")
    tokens = store.tokens(0, store.num_tokens).tolist()
    result = evaluate_model(model, data.path, sequence_length=16, stride=5)
    expected = nats_of_texts(load_model(model), [tokens], 16, 5)
    assert result.evaluation.nats == pytest.approx(expected, rel=1e-6)
    assert result.evaluation.tokens == len(tokens) - 1
    assert evaluate_model(model, data.path, sequence_length=16, stride=16).evaluation == (
        evaluate_model(model, data.path, sequence_length=16).evaluation
    )


@pytest.mark.parametrize("stride", [None, 7])
def test_each_document_by_itself(model: Path, data: DataDirectory, stride: int | None) -> None:
    store = data.split("validation")
    texts = [[256, *store.document(i).tolist()[:-1]] for i in range(store.num_documents)]
    for batch_size in (1, 5):
        result = evaluate_model(
            model, data.path, sequence_length=20, stride=stride, per_document=True, batch_size=batch_size
        )
        expected = nats_of_texts(load_model(model), texts, 20, stride or 20)
        assert result.evaluation.nats == pytest.approx(expected, rel=1e-6)
        assert result.evaluation.tokens == sum(map(len, texts)) - len(texts)
        assert result.evaluation.bytes == data.info.splits["validation"].utf8_bytes


def test_perplexity_per_word(model: Path, data: DataDirectory) -> None:
    result = evaluate_model(model, data.path, word_perplexity=True)
    store = data.split("validation")
    words = sum(
        len(data.tokenizer.decode(store.document(i)).split()) for i in range(store.num_documents)
    )  # one line each, without a line end
    assert result.words == words
    assert result.to_json()["word_perplexity"] == pytest.approx(math.exp(result.evaluation.nats / words))


def test_words_of_wikitext_are_its_published_tokens(shared: Path, tmp_path: Path) -> None:
    wikitext = shared / "data" / "wikitext-2"
    directory = prepare([f"preset:wikitext-2={wikitext}"], tmp_path / "wikitext")
    assert count_words(directory, "test") == 245_569
    assert count_words(directory, "validation") == 217_646


def test_wikitext_s_word_perplexity_against_a_plain_computation(
    make_tokenformer, shared: Path, tmp_path: Path
) -> None:
    """All of WikiText-2's validation split would take minutes: its first articles, the whole way by hand."""
    lines = (shared / "data" / "wikitext-2" / "valid.txt").read_text("utf-8").splitlines(keepends=True)
    text = "".join(lines[:12])
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    (tmp_path / "other.txt").write_text("other text\n")
    data = prepare([tmp_path / "other.txt"], tmp_path / "data", validation=[tmp_path / "text.txt"])
    model = save_model(make_tokenformer(vocab_size=384, seed=3), tmp_path / "model", tokenizer=data.tokenizer)
    result = evaluate_model(
        model, data.path, sequence_length=64, stride=32, per_document=True, word_perplexity=True
    )
    nats = nats_of_texts(load_model(model), [[256, *text.encode("utf-8")]], 64, 32)
    words = len(text.replace("\n", " <eos> ").split())
    assert result.words == words
    assert result.word_perplexity == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert result.evaluation.bits_per_byte == pytest.approx(
        nats / math.log(2) / len(text.encode("utf-8")), rel=1e-6
    )


@pytest.mark.slow
def test_all_of_wikitext_against_brute_force(make_tokenformer, shared: Path, tmp_path: Path) -> None:
    """The whole test split of WikiText-2 in every form, each against one window after the other by hand."""
    text = (shared / "data" / "wikitext-2" / "test.txt").read_text("utf-8")
    (tmp_path / "few.txt").write_text(text[:100_000], encoding="utf-8")
    tokenizer = (
        prepare([tmp_path / "few.txt"], tmp_path / "few", tokenizer="bpe:1024").path / "tokenizer.json"
    )
    source = f"preset:wikitext-2={shared / 'data' / 'wikitext-2'}"
    data = prepare([source], tmp_path / "data", tokenizer=str(tokenizer))
    store, end = data.split("test"), data.tokenizer.eos_token_id
    documents = [store.document(number).tolist()[:-1] for number in range(store.num_documents)]
    assert "".join(map(data.tokenizer.decode, documents)) == text
    network = make_tokenformer(vocab_size=1024, max_position_embeddings=512, seed=4)
    with torch.no_grad():
        network.embedding.weight.mul_(30)  # predictions that differ from place to place
    model = save_model(network, tmp_path / "model", tokenizer=data.tokenizer)
    stream = [token for document in documents for token in (*document, end)]
    begun = [[end, *document] for document in documents]
    words = len(text.replace("\n", " <eos> ").split())
    assert words == 245_569
    first = len(data.tokenizer.decode(stream[:1]).encode())
    for texts, options, text_bytes in (
        ([stream], {}, len(text.encode()) - first),
        ([stream], {"stride": 200}, len(text.encode()) - first),
        (begun, {"per_document": True, "stride": 256}, len(text.encode())),
    ):
        result = evaluate_model(model, data.path, split="test", word_perplexity=True, **options)  # type: ignore[arg-type]
        nats = nats_of_texts(network, texts, 512, options.get("stride", 512))
        assert result.evaluation.tokens == sum(map(len, texts)) - len(texts)
        assert result.evaluation.bytes == text_bytes
        assert result.evaluation.nats == pytest.approx(nats, rel=1e-6)
        assert result.evaluation.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
        assert result.word_perplexity == pytest.approx(math.exp(nats / words), rel=1e-4)
