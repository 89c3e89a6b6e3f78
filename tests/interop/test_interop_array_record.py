"""Data directories to ArrayRecord and back, as the authors' JAX edition reads them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from array_record.python import array_record_module
from grain import sources

from tokenformer.errors import TokenFormerError
from tokenformer.interop.formats import find_conversion
from tokenformer.language.prepare import prepare

RunCommand = Callable[..., tuple[int, str, str]]
TEXTS = [f"document {i}: größe 😀 <|endoftext|>\n" * (i % 5 + 1) for i in range(100)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name in ("validation", "test"):
        (tmp_path / f"{name}.txt").write_text(f"for {name}")
    prepare(
        [tmp_path / "a.jsonl"],
        tmp_path / "data",
        tokenizer="bpe:300",
        validation=[tmp_path / "validation.txt"],
        test=[tmp_path / "test.txt"],
        shard_tokens=3000,
    )
    return tmp_path / "data"


def text_of(record: bytes) -> str:
    """The one feature of a tf.train.Example, taken apart by hand: 1 { 1 { 1: name, 2 { 1 { 1: value } } } }."""

    def field(content: bytes, number: int) -> tuple[bytes, bytes]:
        assert content[0] == number << 3 | 2
        size, position, shift = 0, 1, 0
        while True:
            size |= (content[position] & 127) << shift
            position, shift = position + 1, shift + 7
            if content[position - 1] < 128:
                break
        return content[position : position + size], content[position + size :]

    features, rest = field(record, 1)
    entry, no_more = field(features, 1)
    name, feature = field(entry, 1)
    values, _ = field(feature, 2)
    value, _ = field(field(values, 1)[0], 1)
    assert (name, rest, no_more) == (b"text", b"", b"")
    return value.decode("utf-8")


def test_every_document_is_a_record_that_grain_reads(
    run_command: RunCommand, data: Path, tmp_path: Path
) -> None:
    code, printed, errors = run_command("convert", "native", "arrayrecord", data, tmp_path / "out")
    assert code == 0, errors
    assert "train: 100 documents" in printed
    train = sorted((tmp_path / "out").glob("train.array_record*"))
    assert len(train) > 1  # a file for each shard of the split
    assert train[0].name == f"train.array_record-00000-of-{len(train):05d}"
    source = sources.ArrayRecordDataSource(train)
    assert [text_of(source[i]) for i in range(len(source))] == TEXTS
    reader = array_record_module.ArrayRecordReader(str(train[0]))
    assert "group_size:1," in reader.writer_options_string()
    for split in ("validation", "test"):
        source = sources.ArrayRecordDataSource([tmp_path / "out" / f"{split}.array_record-00000-of-00001"])
        assert [text_of(record) for record in source] == [f"for {split}"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()


def test_what_was_exported_makes_the_same_tokens_again(data: Path, tmp_path: Path) -> None:
    find_conversion("native", "arrayrecord")(data, tmp_path / "out")
    again = prepare(
        [tmp_path / "out" / "train.array_record*"],
        tmp_path / "again",
        tokenizer=data / "tokenizer.json",
        validation=[tmp_path / "out" / "validation.array_record*"],
        shard_tokens=3000,
    )
    assert again.info.splits["train"].documents == 100
    for path in (tmp_path / "again").glob("train*"):
        assert path.read_bytes() == (data / path.name).read_bytes()


def test_what_cannot_be_converted_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = find_conversion("native", "arrayrecord")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(TokenFormerError, match="full: a directory with content is already there"):
        convert(data, tmp_path / "full")
    with pytest.raises(TokenFormerError, match=r"dataset\.json: no such file"):
        convert(tmp_path / "full", tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "array_record.python.array_record_module", None)
        with pytest.raises(TokenFormerError, match="arrayrecord needs array_record"):
            convert(data, tmp_path / "out")

    class Full:
        def __init__(self, path: str, options: str) -> None:
            Path(path).touch()

        def write(self, record: bytes) -> None:
            raise RuntimeError("No space left\non device")

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(
        TokenFormerError, match=r"out/train\.array_record-00000.*written \(No space left on device"
    ):
        convert(data, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
