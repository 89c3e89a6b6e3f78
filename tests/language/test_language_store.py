"""The Megatron indexed format, against files built by hand."""

from __future__ import annotations

import struct
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.errors import TokenFormerError
from tokenformer.language.store import DTYPES, TokenStore, token_dtype
from tokenformer.language.store_writer import TokenStoreWriter

DOCUMENTS = [[5, 6, 256], [256], [1, 2, 3, 4, 256]]
FORMATS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def index_by_hand(code: int, sizes: list[int], documents: list[int]) -> bytes:
    width = struct.calcsize(FORMATS[code])
    pointers = [sum(sizes[:i]) * width for i in range(len(sizes))]
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", len(sizes))
        + struct.pack("<Q", len(documents))
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(sizes)}q", *pointers)
        + struct.pack(f"<{len(documents)}q", *documents)
    )


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> None:
    with TokenStoreWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))


def by_hand(prefix: Path, code: int, documents: list[list[int]]) -> None:
    sizes = [len(document) for document in documents]
    flat = [token for document in documents for token in document]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(flat)}{FORMATS[code]}", *flat))
    Path(f"{prefix}.idx").write_bytes(index_by_hand(code, sizes, list(range(len(sizes) + 1))))


def test_written_files_are_the_format_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "ours", DOCUMENTS)
    by_hand(tmp_path / "hand", 8, DOCUMENTS)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"hand{suffix}").read_bytes()


@pytest.mark.parametrize("code", FORMATS)
def test_every_integer_type_is_read(tmp_path: Path, code: int) -> None:
    documents = [[5, 6, 99], [99], [1, 2, 3, 4, 99]]
    by_hand(tmp_path / "data.v1", code, documents)
    store = TokenStore(tmp_path / "data.v1")
    assert store.dtype == DTYPES[code]
    assert store.num_tokens == 9
    assert [store.document(i).tolist() for i in range(store.num_documents)] == documents
    assert store.tokens(0, 9).tolist() == list(chain.from_iterable(documents))


def test_documents_of_several_sequences_are_read(tmp_path: Path) -> None:
    by_hand(tmp_path / "a", 8, DOCUMENTS)
    (tmp_path / "a.idx").write_bytes(index_by_hand(8, [3, 1, 5], [0, 2, 2, 3]))
    store = TokenStore(tmp_path / "a")
    assert [store.document(i).tolist() for i in range(3)] == [[5, 6, 256, 256], [], [1, 2, 3, 4, 256]]


def test_modes_of_text_are_passed_over_and_others_refused(tmp_path: Path) -> None:
    by_hand(tmp_path / "a", 8, DOCUMENTS)
    index = (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.idx").write_bytes(index + b"\0\0\0")
    assert TokenStore(tmp_path / "a").document(2).tolist() == DOCUMENTS[2]
    (tmp_path / "a.idx").write_bytes(index + b"\0\1\0")
    with pytest.raises(TokenFormerError, match=r"a\.idx: sequence 1 has mode 1, expected 0 \(text\)"):
        TokenStore(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes(index + b"\0\0")
    with pytest.raises(TokenFormerError, match=r"a\.idx: too long"):
        TokenStore(tmp_path / "a")


def read_by_the_definition(prefix: Path) -> list[list[int]]:
    """A reader of its own, of nothing but the format's definition."""
    numpy_names = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
    with Path(f"{prefix}.idx").open("rb") as file:
        assert file.read(9) == b"MMIDIDX\x00\x00"
        assert struct.unpack("<Q", file.read(8)) == (1,)
        (code,) = struct.unpack("<B", file.read(1))
        sequences, boundaries = struct.unpack("<QQ", file.read(16))
        sizes = np.frombuffer(file.read(4 * sequences), "<i4")
        pointers = np.frombuffer(file.read(8 * sequences), "<i8")
        documents = np.frombuffer(file.read(8 * boundaries), "<i8")
        assert file.read() == b""
    content = Path(f"{prefix}.bin").read_bytes()
    read = [
        np.frombuffer(content, numpy_names[code], count=size, offset=pointer).tolist()
        for size, pointer in zip(sizes, pointers, strict=True)
    ]
    return [list(chain(*read[first:last])) for first, last in pairwise(documents)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@given(documents=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=20), max_size=20))
def test_what_is_written_is_read_by_the_definition(
    tmp_path_factory: pytest.TempPathFactory, dtype: type, documents: list[list[int]]
) -> None:
    prefix = tmp_path_factory.mktemp("store") / "train"
    write(prefix, documents, dtype)
    assert read_by_the_definition(prefix) == documents


@given(st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=20), max_size=20), st.data())
def test_what_is_written_is_read(tmp_path_factory, documents: list[list[int]], data) -> None:  # type: ignore[no-untyped-def]
    prefix = tmp_path_factory.mktemp("store") / "train"
    write(prefix, documents)
    store = TokenStore(prefix)
    flat = list(chain.from_iterable(documents))
    assert store.num_documents == len(documents)
    assert store.num_tokens == len(flat)
    assert [store.document(i).tolist() for i in range(len(documents))] == documents
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert store.tokens(start, stop).tolist() == flat[start:stop]


def test_places_outside_the_store_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    store = TokenStore(tmp_path / "a")
    for start, stop in ((-1, 2), (0, 10), (5, 4)):
        with pytest.raises(IndexError):
            store.tokens(start, stop)
    for i in (-1, 3):
        with pytest.raises(IndexError):
            store.document(i)
    with pytest.raises(ValueError, match="read-only"):
        store.tokens(0, 2)[0] = 1


def test_the_smallest_type_that_holds_the_vocabulary(tmp_path: Path) -> None:
    assert token_dtype(65408) == np.uint16
    assert token_dtype(65536) == np.int32
    with (
        pytest.raises(TokenFormerError, match="from 1 to 65536 do not fit uint16"),
        TokenStoreWriter(tmp_path / "a", np.uint16) as writer,
    ):
        writer.add_document(np.array([1, 65536]))
    assert not (tmp_path / "a.idx").exists()


@pytest.mark.parametrize("change", [-1, -2, 2])
def test_a_data_file_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    write(tmp_path / "a", DOCUMENTS)
    content = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    with pytest.raises(
        TokenFormerError, match=rf"a\.bin: .*found {18 + change} bytes, expected 18 \(9 tokens"
    ):
        TokenStore(tmp_path / "a")


@pytest.mark.parametrize("kept", [0, 8, 33, 40, 77, 101])
def test_a_truncated_index_is_refused(tmp_path: Path, kept: int) -> None:
    write(tmp_path / "a", DOCUMENTS)
    content = (tmp_path / "a.idx").read_bytes()
    assert len(content) == 34 + 3 * 12 + 4 * 8
    (tmp_path / "a.idx").write_bytes(content[:kept])
    with pytest.raises(TokenFormerError, match=rf"a\.idx: truncated.*found {kept} bytes, expected"):
        TokenStore(tmp_path / "a")


@pytest.mark.parametrize(
    ("place", "bytes_there", "message"),
    [
        (0, b"X", r"a\.idx: begins with b'XMIDIDX.*expected b'MMIDIDX"),
        (9, b"\x02", r"a\.idx: format version 2, expected 1"),
        (17, b"\x06", r"a\.idx: dtype code 6 \(float64\), expected an integer"),
        (17, b"\x63", r"a\.idx: dtype code 99, expected an integer"),
        (18, b"\xff\xff\xff\xff", r"a\.idx: truncated or corrupt"),
        (34, b"\xff\xff\xff\xff", r"a\.idx: corrupt: a sequence of -1 tokens"),
        (34, b"\x04", r"a\.idx: corrupt: its pointers do not follow"),
        (46, b"\x02", r"a\.idx: corrupt: its pointers do not follow"),
        (70, b"\x01", r"a\.idx: corrupt: its document index does not run from 0"),
        (78, b"\x09", r"a\.idx: corrupt: its document index"),
        (94, b"\x02", r"a\.idx: corrupt: its document index"),
    ],
)
def test_a_corrupt_index_is_refused(tmp_path: Path, place: int, bytes_there: bytes, message: str) -> None:
    write(tmp_path / "a", DOCUMENTS)
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[place : place + len(bytes_there)] = bytes_there
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(TokenFormerError, match=message):
        TokenStore(tmp_path / "a")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenFormerError, match=r"a\.idx: cannot be read \(No such file"):
        TokenStore(tmp_path / "a")
    write(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(TokenFormerError, match=r"a\.bin: cannot be read \(No such file"):
        TokenStore(tmp_path / "a")
