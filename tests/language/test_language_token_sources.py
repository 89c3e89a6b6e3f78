"""Sources that are tokenized already, from Megatron files made by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.documents import list_units, read_documents
from tokenformer.language.prepare import prepare
from tokenformer.language.rules import DocumentRules
from tokenformer.language.tokenizers import train_bpe

TEXTS = [f"document {i}: größe 😀\n" * (i % 4 + 1) for i in range(60)]
FORMATS = {4: "i", 5: "q", 8: "H"}


def write_megatron(prefix: Path, documents: list[list[list[int]]], code: int = 8) -> Path:
    """Documents of sequences of ids, as Megatron's index writer lays them out."""
    sequences = [sequence for document in documents for sequence in document]
    sizes = [len(sequence) for sequence in sequences]
    ids = [id for sequence in sequences for id in sequence]
    width = struct.calcsize(FORMATS[code])
    starts, boundaries = [0], [0]
    for size in sizes:
        starts.append(starts[-1] + size * width)
    for document in documents:
        boundaries.append(boundaries[-1] + len(document))
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(ids)}{FORMATS[code]}", *ids))
    index = Path(f"{prefix}.idx")
    index.write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sizes), len(boundaries))
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(sizes)}q", *starts[:-1])
        + struct.pack(f"<{len(boundaries)}q", *boundaries)
    )
    return index


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    (tmp_path / "v.txt").write_text("held out")
    return tmp_path / "v.txt"


def documents_of(data: DataDirectory, split: str = "train") -> list[list[int]]:
    stream = data.split(split)
    return [stream.document(i).tolist() for i in range(stream.num_documents)]


@pytest.mark.parametrize("name", ["store", "store.idx", "store.bin", "folder", "*"])
@pytest.mark.parametrize("code", FORMATS)
def test_tokens_are_copied_with_their_boundaries(
    tmp_path: Path, held_out: Path, name: str, code: int
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    two = [bytes_of("größe"), [*bytes_of(" 😀"), 256]]  # a document of two sequences
    write_megatron(folder / "store", [two, [[7, 8, 256]], [[9]], [[256, 10, 256]]], code)
    source = folder if name == "folder" else folder / name
    data = prepare([source], tmp_path / "data", validation=[held_out])
    assert documents_of(data) == [
        [*bytes_of("größe 😀"), 256], [7, 8, 256], [9, 256], [256, 10, 256],
    ]  # fmt: skip
    assert data.info.splits["train"].utf8_bytes == len("größe 😀".encode()) + 4
    assert data.info.dtype == "uint16"


def test_the_result_is_that_of_the_texts_themselves(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 300)
    tokenizer.save(tmp_path)
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    documents = [[[*tokenizer.encode(text), tokenizer.eos_token_id]] for text in TEXTS]
    write_megatron(tmp_path / "store", documents, code=4)
    given = tmp_path / "tokenizer.json"
    of_texts = prepare([tmp_path / "texts.json"], tmp_path / "one", tokenizer=given)
    of_ids = prepare([tmp_path / "store"], tmp_path / "two", tokenizer=given)
    assert of_ids.info.split_rule.method == "content_hash"
    counts = (of_texts.info.splits, of_ids.info.splits)
    assert sum(s.utf8_bytes for s in counts[0].values()) == sum(s.utf8_bytes for s in counts[1].values())
    both = [
        sorted(map(tuple, documents_of(data) + documents_of(data, "validation")))
        for data in (of_texts, of_ids)
    ]
    assert both[0] == both[1]


def test_texts_and_tokens_together_in_order(tmp_path: Path, held_out: Path) -> None:
    index = write_megatron(tmp_path / "store", [[[1, 2]], [[3]]])
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    sources = [tmp_path / "a.txt", index, tmp_path / "b.txt"]
    data = prepare(sources, tmp_path / "data", validation=[held_out])
    assert documents_of(data) == [[97, 256], [1, 2, 256], [3, 256], [98, 256]]


def test_our_own_data_directory_is_such_a_source(tmp_path: Path, held_out: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    first = prepare([tmp_path / "texts.json"], tmp_path / "first", tokenizer="bpe:300", validation=[held_out])
    again = prepare(
        [tmp_path / "first" / "train.idx"],
        tmp_path / "again",
        tokenizer=tmp_path / "first",
        validation=[tmp_path / "first" / "validation.idx"],
    )
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    assert again.info.splits == first.info.splits
    with pytest.raises(
        TokenFormerError, match=r"first: a data directory; name the tokens of one split, .*train\.idx"
    ):
        prepare([tmp_path / "first"], tmp_path / "x", tokenizer=tmp_path / "first")
    with pytest.raises(
        TokenFormerError, match=r"train\.idx: its tokenizer .* is not the one given .*use --tokenizer"
    ):
        prepare([tmp_path / "first" / "train.idx"], tmp_path / "x")


def test_rules_that_apply_to_ids(tmp_path: Path, held_out: Path) -> None:
    index = write_megatron(tmp_path / "store", [[[1, 2, 256]], [[256]], [[1, 2]], [], [[3]], [[4]]])
    rules = DocumentRules(deduplicate=True, exclude_name="document 5")
    data = prepare([index], tmp_path / "data", validation=[held_out], rules=rules)
    assert documents_of(data) == [[1, 2, 256], [4, 256]]
    assert data.info.skipped == {"duplicate": 1, "empty": 2, "name excluded": 1}


def test_documents_are_never_cut(tmp_path: Path) -> None:
    index = write_megatron(tmp_path / "store", [[list(range(32, 120))], [list(range(40, 120))]])
    data = prepare([index], tmp_path / "data", validation_fraction=1e-9)
    assert data.info.split_rule.method == "tail"
    assert documents_of(data) == [[*range(32, 120), 256]]
    assert documents_of(data, "validation") == [[*range(40, 120), 256]]
    one = write_megatron(tmp_path / "one", [[[1, 2, 3]]])
    with pytest.raises(TokenFormerError, match="too few to divide: nothing is left for validation"):
        prepare([one], tmp_path / "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "bpe:300"}, r"store\.idx: tokenized already; name the tokenizer that made it"),
        (
            {"rules": DocumentRules(min_length=1, include="x")},
            r"already, but min_length, include looks at text",
        ),
        (
            {},
            r"store\.idx: document 2: token 3 is 257, expected 0 to 256: these are not ids of the tokenizer",
        ),
    ],
)
def test_what_cannot_be_taken_is_refused(
    tmp_path: Path, held_out: Path, options: dict[str, object], message: str
) -> None:
    index = write_megatron(tmp_path / "store", [[[1]], [[2, 3, 257]], [[4]]])
    with pytest.raises(TokenFormerError, match=message):
        prepare([index], tmp_path / "data", validation=[held_out], **options)  # type: ignore[arg-type]
    assert not (tmp_path / "data").exists()


def test_ids_outside_the_vocabulary_are_skipped_and_counted_on_request(
    tmp_path: Path, held_out: Path
) -> None:
    index = write_megatron(tmp_path / "store", [[[1]], [[2, 3, 257]], [[-1]], [[4]]], code=5)
    rules = DocumentRules(on_error="skip")
    data = prepare([index], tmp_path / "data", validation=[held_out], rules=rules)
    assert documents_of(data) == [[1, 256], [4, 256]]
    assert data.info.skipped == {"not in the vocabulary": 2}


def test_damage_is_named_and_never_passed_over(tmp_path: Path, held_out: Path) -> None:
    index = write_megatron(tmp_path / "store", [[[1, 2, 3]]])
    (tmp_path / "store.bin").write_bytes(b"\x01\x00\x02\x00\x03")
    rules = DocumentRules(on_error="skip")
    with pytest.raises(TokenFormerError, match=r"store\.bin: truncated: found 5 bytes, expected 6"):
        prepare([index], tmp_path / "data", validation=[held_out], rules=rules)
    (tmp_path / "store.bin").unlink()
    with pytest.raises(TokenFormerError, match=r"store\.bin: cannot be read \(No such file"):
        prepare([index], tmp_path / "data", validation=[held_out], rules=rules)


def test_other_bin_files_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0\1")
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "b.txt.idx").touch()
    assert list_units(tmp_path / "b.txt")[0].place == tmp_path / "b.txt"
    (tmp_path / "b.txt.idx").unlink()
    assert [unit.place for unit in list_units(tmp_path)] == [tmp_path / "a.bin", tmp_path / "b.txt"]
    assert [document.text for document in read_documents(tmp_path)] == ["text"]
    write_megatron(tmp_path / "a", [[[5]]])
    units = list_units(tmp_path)
    assert [unit.place for unit in units] == [tmp_path / "a.idx", tmp_path / "b.txt"]
    assert units[0].files() == [tmp_path / "a.bin", tmp_path / "a.idx"]
    ids = next(read_documents(tmp_path)).tokens
    assert ids is not None
    assert np.array_equal(ids, [5])
