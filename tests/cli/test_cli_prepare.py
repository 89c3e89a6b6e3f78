"""``tokenformer prepare`` as users run it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset

from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.presets import PRESETS
from tokenformer.models.directory import save_model

RunCommand = Callable[..., tuple[int, str, str]]
LINES = "".join(f"line {i} of the book\n" for i in range(400))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(LINES)
    return path


def test_a_text_becomes_a_data_directory_with_a_summary(
    run_command: RunCommand, book: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data" / "book"
    code, printed, errors = run_command("prepare", book, "--out", out)
    assert code == 0, errors
    data = DataDirectory.open(out)
    store = data.split("train")
    assert LINES.startswith(data.tokenizer.decode(store.tokens(0, store.num_tokens)))
    splits = data.info.splits
    rows = {
        line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(tuple(splits))
    }
    for name, counts in splits.items():
        assert rows[name] == [f"{n:,}" for n in (counts.documents, counts.tokens, counts.utf8_bytes)]
    assert data.info.corpus_sha256 in printed
    assert f"tokenformer train RECIPE data.path={out}" in printed


def test_all_options_together(run_command: RunCommand, book: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(json.dumps({"body": "held out"}) + "\n")
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"body": "more text"}) + "\n")
    options = ["--tokenizer", "bpe:270", "--validation", held_out, "--text-field", "body"]
    code, printed, errors = run_command("prepare", book, more, "--out", tmp_path / "one", *options)
    assert code == 0, errors
    one = DataDirectory.open(tmp_path / "one")
    assert one.tokenizer.decode(one.split("validation").document(0)) == "held out"
    assert one.split("train").num_documents == 2
    assert "tokenizer: bpe:270, 270 ids" in printed

    given = ["--tokenizer", tmp_path / "one" / "tokenizer.json", "--validation-fraction", "0.25"]
    assert run_command("prepare", book, "--out", tmp_path / "two", *given)[0] == 0
    two = DataDirectory.open(tmp_path / "two")
    assert two.tokenizer.sha256 == one.tokenizer.sha256
    assert two.info.splits["validation"].utf8_bytes == pytest.approx(len(LINES) / 4, abs=30)


def test_rules_and_sources_of_many_kinds(run_command: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "second"}\n{"text": 1}\n'))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "first"}\n{"text": "tiny"}\n'))
    pq.write_table(pa.table({"text": ["third", "first"]}), tmp_path / "t.parquet")
    Dataset.from_dict({"text": ["fourth"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "v.json").write_text('["held out"]')
    sources = [tmp_path / "t.parquet", tmp_path / "*.zst", tmp_path / "saved"]
    options = [
        "--deduplicate",
        "--min-length",
        "5",
        "--on-error",
        "skip",
        "--validation",
        tmp_path / "v.json",
    ]
    code, printed, errors = run_command("prepare", *sources, "--out", tmp_path / "data", *options)
    assert code == 0, errors
    data = DataDirectory.open(tmp_path / "data")
    store = data.split("train")
    found = [data.tokenizer.decode(store.document(i)[:-1]) for i in range(store.num_documents)]
    assert found == ["third", "first", "second", "fourth"]
    assert "documents: at least 5 characters, without duplicates, on error skip" in printed
    for reason in ("1 duplicate", "1 not a string", "1 too short"):
        assert f"skipped: {reason}" in printed


def test_a_dataset_out_of_reach_names_the_local_way(
    run_command: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, errors = run_command("prepare", "hf:nobody/nothing", "--out", tmp_path / "data")
    assert code == 2
    assert "hf download --repo-type dataset nobody/nothing" in " ".join(errors.split())
    assert not (tmp_path / "data").exists()


def test_the_default_corpus(run_command: RunCommand, tmp_path: Path) -> None:
    code, printed, errors = run_command("prepare", "default", "--out", tmp_path / "data")
    assert code == 0, errors
    info = DataDirectory.open(tmp_path / "data").info
    assert info.split_rule.method == "content_hash"
    assert info.splits["train"].utf8_bytes > 5_000_000
    assert 0.01 < info.splits["validation"].documents / info.splits["train"].documents < 0.15
    assert f"corpus SHA-256: {info.corpus_sha256}" in printed


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b"\x80\x81garbage", [], "a.txt: not UTF-8 text: byte 0x80 at offset 0"),
        ("a.txt", b"", [], "a.txt: an empty corpus: found no text"),
        ("a.txt", b"x", [], "1 bytes of text are too few to divide"),
        ("a.jsonl", b'{"text": "x"}\n{', [], "a.jsonl:2: invalid JSON"),
        ("a.jsonl", b'{"text": "x"}', ["--text-field", "body"], "a.jsonl:1: no field 'body'; found text"),
        ("a.txt", b"x\ny\n", ["--tokenizer", "bpe:12"], "tokenizer: found 'bpe:12'"),
        ("a.txt", b"x\ny\n", ["--tokenizer", "no.json"], "tokenizer: found 'no.json', expected byte, bpe:N"),
        ("a.txt", b"x\ny\n", ["--validation-fraction", "2"], "validation_fraction: found 2.0"),
        ("a.json", b'["x",\n{"body": 1}]', [], "a.json:2: no field 'text'; found body"),
        ("a.txt.zst", b"text", [], "a.txt.zst: damaged or not a .zst file"),
        ("a.parquet", b"text", [], "a.parquet: damaged or not a .parquet file"),
        ("a.txt", b"x\ny\n", ["*.parquet"], "*.parquet: no file or folder matches this glob"),
        ("a.txt", b"x\ny\n", ["hf::x"], "hf::x: expected hf:NAME[:config][:split]"),
        ("a.txt", b"x\ny\n", ["--on-error", "ignore"], "Invalid value for '--on-error'"),
        ("a.txt", b"x\ny\n", ["--min-length", "-1"], "Invalid value for '--min-length'"),
        ("a.txt", b"x\ny\n", ["--validation", "nowhere"], "nowhere: no such file or folder"),
        ("b.txt", b"x\ny\n", ["a.txt"], "a.txt: no such file or folder"),
    ],
)
def test_wrong_input_is_one_message_and_leaves_nothing(
    run_command: RunCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    code, printed, errors = run_command("prepare", name, "--out", "data", *options)
    assert code == 2
    assert printed == ""
    assert message in errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_output_with_content_is_refused(run_command: RunCommand, book: Path, tmp_path: Path) -> None:
    assert run_command("prepare", book, "--out", tmp_path / "data")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    code, _, errors = run_command("prepare", book, "--out", tmp_path / "data", "--tokenizer", "bpe:300")
    assert code == 2
    assert "data: a directory with content is already there" in errors
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


def test_help_shows_examples(run_command: RunCommand) -> None:
    code, printed, _ = run_command("prepare", "--help")
    assert code == 0
    assert "tokenformer prepare default --out data/default" in printed


def test_a_test_split_is_made_inspected_and_evaluated(
    run_command: RunCommand, book: Path, tmp_path: Path, make_tokenformer: Callable[..., Any]
) -> None:
    (tmp_path / "t.txt").write_text("what is tested\n" * 20)
    code, printed, errors = run_command(
        "prepare", book, "--test", tmp_path / "t.txt", "--out", tmp_path / "data", "--max-length", "10000"
    )
    assert code == 0, errors
    assert any(line.split()[:2] == ["test", "1"] for line in printed.splitlines())
    code, printed, errors = run_command("inspect", tmp_path / "data")
    assert code == 0, errors
    assert "what is tested" in printed
    assert "test sources" in printed
    assert "at most 10,000 characters" in printed
    save_model(make_tokenformer(vocab_size=384), tmp_path / "model")
    code, printed, errors = run_command(
        "evaluate", tmp_path / "model", "--data", tmp_path / "data", "--split", "test"
    )
    assert code == 0, errors


def test_presets_are_listed(run_command: RunCommand) -> None:
    code, printed, errors = run_command("prepare", "--list-presets")
    assert code == 0, errors
    for name in PRESETS:
        assert any(line.startswith(f"{name} ") for line in printed.splitlines())


def test_work_options(tmp_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {number:03}\n" for number in range(200)))
    done = run_command(
        "prepare", tmp_path / "a.txt", "--out", tmp_path / "data", "--workers", 1, "--shard-size", 500
    )
    assert done.code == 0, done.err
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert info["splits"]["train"]["shards"] == 1  # a document is not divided
    for options, message in (
        (("--ray-address", "auto"), "--ray-address: needs --engine ray"),
        (("--engine", "ray", "--workers", 2), "--workers: has no meaning with --engine ray"),
        (("--engine", "spark"), "'spark' is not one of"),
        (("--workers", 0), "greater than or equal to 1"),
        (("--shard-size", 0), "greater than or equal to 1"),
    ):
        refused = run_command("prepare", tmp_path / "a.txt", "--out", tmp_path / "other", *options)
        assert refused.code == 2
        assert message in " ".join(refused.err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "data"]
