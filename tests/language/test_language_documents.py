"""Sources to documents."""

from __future__ import annotations

import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import pytest

from tokenformer.errors import TokenFormerError
from tokenformer.language.documents import check_sources, read_documents
from tokenformer.language.sources.records import Document
from tokenformer.language.standard_library import standard_library_files


def texts(source: Path | str, **options: object) -> list[str]:
    return [document.text for document in read_documents(source, **options)]  # type: ignore[arg-type]


def json_lines(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    content = "Zeile eins\r\n\u00fcber \U0001f600\n\n no end".encode()
    (tmp_path / "a.md").write_bytes(content)
    (document,) = read_documents(tmp_path / "a.md")
    assert document.text.encode() == content
    assert document.name == str(tmp_path / "a.md")


def test_json_lines_are_documents_with_line_numbers_and_blank_lines_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "one", "x": 1}\n\n{"text": "two\\nlines"}\n', encoding="utf-8")
    found = list(read_documents(path))
    assert found == [Document("one", f"{path}:1"), Document("two\nlines", f"{path}:3")]
    json_lines(path, [{"body": "b"}])
    assert texts(path, text_field="body") == ["b"]


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_compressed_forms_hold_the_same_documents(tmp_path: Path, suffix: str, pack) -> None:  # type: ignore[no-untyped-def]
    plain = json_lines(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(50)])
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(plain.read_bytes()))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack("größer".encode()))
    assert texts(tmp_path / f"a.jsonl{suffix}") == texts(plain)
    assert texts(tmp_path / f"b.txt{suffix}") == ["größer"]


def test_a_folder_is_read_sorted_without_hidden_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "b" / ".hidden").mkdir(parents=True)
    (tmp_path / "b" / "z.txt").write_text("third")
    (tmp_path / "b" / ".hidden" / "no.txt").write_text("hidden")
    (tmp_path / ".no.txt").write_text("hidden")
    (tmp_path / "c.py").write_text("fourth")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0\xff")
    json_lines(tmp_path / "a.jsonl", [{"text": "first"}, {"text": "second"}])
    skipped: Counter[str] = Counter()
    assert texts(tmp_path, skipped=skipped) == ["first", "second", "third", "fourth"]
    assert skipped == {"binary": 1}


def test_the_default_corpus_is_the_standard_library_without_packages(tmp_path: Path) -> None:
    for name in (
        "b.py",
        "a/z.py",
        "a/__pycache__/x.py",
        "site-packages/p.py",
        "dist-packages/p.py",
        "no.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    assert [name for _, name in standard_library_files(tmp_path)] == ["a/z.py", "b.py"]

    names = [name for _, name in standard_library_files()]
    assert names == sorted(names)
    assert {"json/decoder.py", "textwrap.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name]
    skipped: Counter[str] = Counter()
    documents = list(read_documents("default", skipped=skipped))
    assert len(documents) + skipped["not UTF-8"] == len(names)
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_an_interpreter_without_sources_is_explained(tmp_path: Path) -> None:
    with pytest.raises(TokenFormerError, match="no Python source files"):
        standard_library_files(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"a\.jsonl:2: invalid JSON at column"),
        ('{"body": "x", "id": 3}', r"a\.jsonl:2: no field 'text'; found body, id"),
        ('{"text": 3}', r"a\.jsonl:2: field 'text' is a int, expected a string"),
        ('["text"]', r"a\.jsonl:2: found a JSON list, expected an object"),
        ('{"text": "\\ud83d"}', r"a\.jsonl:2: field 'text' holds half a surrogate pair at character 0"),
        ("[" * 100_000, r"a\.jsonl:2: "),
    ],
)
def test_wrong_json_lines_are_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(TokenFormerError, match=message):
        texts(path)


def test_garbage_is_named_by_file_and_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\xfe")
    with pytest.raises(TokenFormerError, match=r"a\.txt: not UTF-8 text: byte 0xff at offset 5"):
        texts(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    with pytest.raises(TokenFormerError, match=r"b\.jsonl:2: not UTF-8 text: byte 0xff at offset 24"):
        texts(tmp_path / "b.jsonl")


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_damaged_archives_are_named(tmp_path: Path, suffix: str) -> None:
    pack = lzma.compress if suffix == ".xz" else gzip.compress
    whole = pack(bytes(range(256)) * 100)
    for content in (b"not packed at all", whole[: len(whole) // 2]):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(content)
        with pytest.raises(TokenFormerError, match=rf"a\.txt{suffix}: damaged or not a {suffix} file"):
            texts(path)


def test_missing_sources_are_refused_before_reading(tmp_path: Path) -> None:
    with pytest.raises(TokenFormerError, match=r"nowhere: no such file or folder; expected a text file"):
        check_sources([tmp_path, tmp_path / "nowhere"])
    with pytest.raises(TokenFormerError, match="sources: none given"):
        check_sources([])
    with pytest.raises(TokenFormerError, match="no such file"):
        texts(tmp_path / "nowhere")
