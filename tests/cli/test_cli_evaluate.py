"""``tokenformer evaluate`` as users run it."""

import json
from pathlib import Path

import pytest

from tokenformer.evaluation.perplexity import evaluate_model
from tokenformer.language.prepare import prepare
from tokenformer.models.directory import save_model
from tokenformer.models.registry import build_model
from tokenformer.models.transformer.config import TransformerConfig


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model/``, and ``data/`` of its tokenizer beside ``other/`` of another one."""
    work = tmp_path_factory.mktemp("evaluate")
    (work / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    data = prepare([work / "text.txt"], work / "data", validation_fraction=0.2)
    prepare([work / "text.txt"], work / "other", tokenizer="bpe:270")
    config = TransformerConfig(
        vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32
    )
    save_model(build_model(config), work / "model", tokenizer=data.tokenizer)
    return work


def test_the_table_and_the_file(run_command, work: Path, tmp_path: Path) -> None:
    done = run_command(
        "evaluate", work / "model", "--data", work / "data", "--json", tmp_path / "result.json"
    )
    assert (done.code, done.err) == (0, "")
    expected = evaluate_model(work / "model", work / "data")
    assert f"{expected.evaluation.loss:.6f}" in done.out
    assert f"{expected.evaluation.bits_per_byte:.6f}" in done.out
    assert json.loads((tmp_path / "result.json").read_text()) == expected.to_json()


def test_options(run_command, work: Path, tmp_path: Path) -> None:
    options = ["--split", "train", "--sequence-length", 9, "--batch-size", 4, "--device", "cpu"]
    done = run_command(
        "evaluate", work / "model", "--data", work / "data", *options, "--json", tmp_path / "r.json"
    )
    assert done.code == 0
    found = json.loads((tmp_path / "r.json").read_text())
    expected = evaluate_model(work / "model", work / "data", split="train", sequence_length=9)
    assert found["loss"] == pytest.approx(expected.evaluation.loss, abs=1e-6)
    assert (found["split"], found["sequence_length"]) == ("train", 9)


def test_forms_of_perplexity(run_command, work: Path, tmp_path: Path) -> None:
    options = ["--sequence-length", 16, "--stride", 4, "--per-document", "--word-perplexity"]
    done = run_command(
        "evaluate", work / "model", "--data", work / "data", *options, "--json", tmp_path / "r.json"
    )
    assert done.code == 0, done.err
    assert "perplexity per word" in done.out
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["stride"], found["per_document"]) == (4, True)
    assert found["word_perplexity"] > found["perplexity"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--data", "other"], "not the model's"),
        (["model", "--data", "absent"], "absent: no such directory"),
        (["absent", "--data", "data"], "absent: no such directory"),
        (["data", "--data", "data"], "data: holds neither"),
        (["model", "--data", "data", "--split", "test"], "no split 'test'"),
        (["model", "--data", "data", "--sequence-length", "33"], "sequence_length is 33"),
        (["model", "--data", "data", "--batch-size", "0"], "--batch-size"),
        (["model", "--data", "data", "--device", "cuda:99"], "cuda:99"),
        (["model"], "--data"),
    ],
)
def test_wrong_input(
    run_command, work: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(work)
    done = run_command("evaluate", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err


def test_an_existing_result_is_not_overwritten(run_command, work: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("mine")
    done = run_command(
        "evaluate", work / "model", "--data", work / "data", "--json", tmp_path / "result.json"
    )
    assert (done.code, done.out) == (2, "")
    assert (tmp_path / "result.json").read_text() == "mine"
