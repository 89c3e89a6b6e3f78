"""TFRecord and ArrayRecord, from files made here by the formats' definitions or the formats' own library."""

from __future__ import annotations

import gzip
import json
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.errors import TokenFormerError
from tokenformer.language.documents import read_documents
from tokenformer.language.sources.tf_example import encode_example, parse_example

TEXTS = [f"document {i}: größe 😀\n" * (i % 4 + 1) for i in range(300)]


def crc32c(content: bytes) -> int:
    """Castagnoli's CRC, bit by bit, by its definition (reflected polynomial 0x82F63B78)."""
    value = 0xFFFFFFFF
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def masked(content: bytes) -> bytes:
    value = crc32c(content)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecord(records: Iterable[bytes]) -> bytes:
    """uint64 length, masked CRC of it, the record, masked CRC of it."""
    heads = ((struct.pack("<Q", len(record)), record) for record in records)
    return b"".join(head + masked(head) + record + masked(record) for head, record in heads)


def field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field of less than 16,384 bytes."""
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return bytes([number << 3 | 2]) + length + content


def example(**texts: str) -> bytes:
    """Example{1: Features{1: {1: name, 2: Feature{1: BytesList{1: value}}}}}, encoded by hand."""
    entries = (
        field(1, field(1, name.encode()) + field(2, field(1, field(1, text.encode()))))
        for name, text in texts.items()
    )
    return field(1, b"".join(entries))


def write_array_record(path: Path, records: Iterable[bytes], options: str = "group_size:1") -> None:
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()


def texts(source: Path | str, **options: object) -> list[str]:
    return [document.text for document in read_documents(source, **options)]  # type: ignore[arg-type]


def refused(source: Path | str, message: str, **options: object) -> None:
    with pytest.raises(TokenFormerError, match=message):
        texts(source, **options)


def test_the_checksum_of_this_file_is_the_published_one() -> None:
    assert crc32c(b"123456789") == 0xE3069283


class TestExample:
    def test_bytes_are_those_of_the_definition(self) -> None:
        assert encode_example({"text": "größe".encode()}) == example(text="größe")
        ids = field(1, field(1, field(1, b"ids") + field(2, field(3, field(1, b"\x05\xac\x02")))))
        assert encode_example({"ids": [5, 300]}) == ids
        assert parse_example(ids) == {"ids": [5, 300]}

    @given(
        st.dictionaries(st.text(st.characters(codec="utf-8")), st.binary() | st.lists(st.integers(0, 2**40)))
    )
    def test_back_and_forth(self, features: dict[str, bytes | list[int]]) -> None:
        expected = {name: [v] if isinstance(v, bytes) else v for name, v in features.items()}
        assert parse_example(encode_example(features)) == (expected or None)

    @pytest.mark.parametrize("record", [b"", b"plain text", b"\nabc", b'{"text": 1}', b"\xff\xff"])
    def test_other_records_are_none(self, record: bytes) -> None:
        assert parse_example(record) is None


class TestTFRecord:
    @pytest.mark.parametrize(
        "name", ["a.tfrecord", "a.tfrecords", "a.tfrecord-00000-of-00010", "a.tfrecord.gz", "a.tfrecord.zip"]
    )
    def test_records_are_documents(self, tmp_path: Path, name: str) -> None:
        content = tfrecord(example(id=str(i), text=text) for i, text in enumerate(TEXTS))
        path = tmp_path / name
        if name.endswith(".zip"):
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("a.tfrecord", content)
        else:
            path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        found = list(read_documents(path))
        assert [document.text for document in found] == TEXTS
        assert found[122].name == f"{path}: record 123"
        assert texts(tmp_path) == TEXTS  # in a folder it is no binary file to pass over
        assert texts(path, text_field="id") == [str(i) for i in range(len(TEXTS))]

    def test_plain_text_and_json_are_taken_as_such(self, tmp_path: Path) -> None:
        records = [
            "\nplain größe".encode(),
            b"",
            json.dumps({"text": "in JSON"}).encode(),
            b" \n",
            b"x" * 300,
        ]
        (tmp_path / "a.tfrecord").write_bytes(tfrecord(records))
        assert texts(tmp_path / "a.tfrecord") == ["\nplain größe", "", "in JSON", " \n", "x" * 300]

    def test_an_empty_file_holds_none(self, tmp_path: Path) -> None:
        (tmp_path / "a.tfrecord").touch()
        assert texts(tmp_path / "a.tfrecord") == []

    @pytest.mark.parametrize(
        ("record", "message", "reason"),
        [
            (example(body="x"), "no feature 'text'; found body", "without the text field"),
            (encode_example({"text": [1]}), "feature 'text' holds one int, expected one", "not a string"),
            (encode_example({"text": [1, 2]}), "feature 'text' holds 2 values", "not a string"),
            (encode_example({"text": b"ok\xff"}), "feature 'text': not UTF-8 text: byte 0xff at offset 2", "not UTF-8"),
            (b"\xff\xfe", r"\(no tf\.train\.Example\): not UTF-8 text: byte 0xff at offset 0", "not UTF-8"),
            (b'{"text": ', "invalid JSON", "invalid JSON"),
            (b'{"body": 1}', "no field 'text'; found body", "without the text field"),
        ],
    )  # fmt: skip
    def test_broken_records_stop_or_are_counted(
        self, tmp_path: Path, record: bytes, message: str, reason: str
    ) -> None:
        path = tmp_path / "a.tfrecord"
        path.write_bytes(tfrecord([example(text="one"), record, example(text="two")]))
        refused(path, rf"a\.tfrecord: record 2.*{message}")
        skipped: Counter[str] = Counter()
        assert texts(path, on_error="skip", skipped=skipped) == ["one", "two"]
        assert skipped == {reason: 1}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c[:-1], r"record 2 at offset 35: cut off: found 22 bytes, expected 23"),
            (lambda c: c[:40], r"record 2 at offset 35: cut off: found 5 bytes, expected 12"),
            (lambda c: c[:36] + b"\x01" + c[37:], "record 2 at offset 35: damaged or not a TFRecord file"),
            (lambda c: c[:50] + b"\x01" + c[51:], "record 2 at offset 35: damaged: the content fails"),
            (lambda c: c[:-1] + b"\x01", "record 2 at offset 35: damaged: the content fails"),
            (lambda c: b"this is text, not records", "record 1 at offset 0: damaged or not a TFRecord file"),
            (lambda c: c + struct.pack("<Q", 2**40) + masked(struct.pack("<Q", 2**40)), "a record of 1099511627776"),
        ],
    )  # fmt: skip
    def test_damage_is_named_and_never_passed_over(
        self, tmp_path: Path, change: object, message: str
    ) -> None:
        path = tmp_path / "a.tfrecord"
        content = tfrecord([example(text="one"), example(text="two")])
        assert len(content) == 70
        path.write_bytes(change(content))  # type: ignore[operator]
        refused(path, rf"a\.tfrecord: .*{message}")
        refused(path, message, on_error="skip")

    def test_a_missing_package_is_named_with_the_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "google_crc32c", None)
        (tmp_path / "a.tfrecord").write_bytes(tfrecord([b"x"]))
        refused(tmp_path / "a.tfrecord", r"needs google_crc32c.*pip install 'tokenformer\[data\]'")

    def test_a_missing_file_and_a_cut_off_gz(self, tmp_path: Path) -> None:
        refused(tmp_path / "a.tfrecord", "no such file or folder")
        whole = gzip.compress(tfrecord([example(text=text) for text in TEXTS]))
        (tmp_path / "a.tfrecord.gz").write_bytes(whole[:-20])
        refused(tmp_path / "a.tfrecord.gz", r"a\.tfrecord\.gz: damaged or not a \.gz file")


class TestArrayRecord:
    @pytest.mark.parametrize("name", ["a.array_record", "a.arrayrecord", "a.array_record-00001-of-00002"])
    @pytest.mark.parametrize("options", ["group_size:1", "group_size:7,uncompressed", ""])
    def test_records_are_documents_in_order(self, tmp_path: Path, name: str, options: str) -> None:
        write_array_record(tmp_path / name, (example(text=text) for text in TEXTS), options)
        found = list(read_documents(tmp_path / name))
        assert [document.text for document in found] == TEXTS
        assert found[122].name == f"{tmp_path / name}: record 123"
        assert texts(tmp_path) == TEXTS

    def test_plain_text_json_and_no_record(self, tmp_path: Path) -> None:
        write_array_record(tmp_path / "a.array_record", [b"plain", b'{"text": "in JSON"}'])
        assert texts(tmp_path / "a.array_record") == ["plain", "in JSON"]
        write_array_record(tmp_path / "b.array_record", [])
        assert texts(tmp_path / "b.array_record") == []

    def test_broken_records_stop_or_are_counted(self, tmp_path: Path) -> None:
        path = tmp_path / "a.array_record"
        write_array_record(path, [example(text="one"), example(body="x"), example(text="two")])
        refused(path, r"a\.array_record: record 2: no feature 'text'; found body")
        skipped: Counter[str] = Counter()
        assert texts(path, on_error="skip", skipped=skipped) == ["one", "two"]
        assert skipped == {"without the text field": 1}

    def test_damage_is_named_and_never_passed_over(self, tmp_path: Path) -> None:
        path = tmp_path / "a.array_record"
        write_array_record(path, (example(text=f"{i} " + "x" * 200) for i in range(1000)), "uncompressed")
        whole = path.read_bytes()
        for content in (b"", b"text " * 1000, whole[: len(whole) // 2], whole[:-1000]):
            path.write_bytes(content)
            refused(path, r"a\.array_record: damaged or not a \.array_record file \(", on_error="skip")
        path.write_bytes(whole[:70_000] + b"\0" * 50 + whole[70_050:])
        refused(path, r"a\.array_record: record \d+: damaged \(Corrupted", on_error="skip")

    def test_one_packed_again_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.array_record.gz").write_bytes(gzip.compress(b"x"))
        refused(tmp_path / "a.array_record.gz", r"a packed \.array_record file")


class TestZip:
    def test_the_one_file_is_read(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.txt.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.mkdir("folder")
            archive.writestr("folder/anything", "".join(TEXTS))
        assert texts(tmp_path / "a.txt.zip") == ["".join(TEXTS)]

    def test_several_files_and_damage_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("one", "1" * 1000)
        content = path.read_bytes()
        path.write_bytes(content.replace(b"1" * 1000, b"1" * 999 + b"2"))
        refused(path, r"a\.txt\.zip: damaged or not a \.zip file \(Bad CRC-32")
        path.write_bytes(content[:-10])
        refused(path, r"a\.txt\.zip: damaged or not a \.zip file")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("one", "1")
            archive.writestr("two", "2")
        refused(path, r"a\.txt\.zip: an archive of 2 files, expected one file")
