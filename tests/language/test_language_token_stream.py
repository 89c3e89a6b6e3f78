"""Several shards read as one."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DATASET_FILE, DataDirectory
from tokenformer.language.prepare import prepare
from tokenformer.language.store import shard_prefixes
from tokenformer.language.store_writer import TokenStoreWriter
from tokenformer.language.token_stream import TokenStream

Documents = list[list[int]]


def write(directory: Path, split: str, shards: list[Documents], dtype: type = np.uint16) -> None:
    for prefix, documents in zip(shard_prefixes(directory, split, len(shards)), shards, strict=True):
        with TokenStoreWriter(prefix, dtype) as writer:
            for document in documents:
                writer.add_document(np.array(document, dtype=np.int64))


def test_names_of_shards() -> None:
    assert shard_prefixes(Path("d"), "train", 1) == [Path("d/train")]
    assert shard_prefixes(Path("d"), "train", 3) == [Path(f"d/train-0000{i}-of-00003") for i in range(3)]


documents = st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=9), max_size=6)


@given(shards=st.lists(documents, min_size=1, max_size=4), data=st.data())
def test_shards_are_one_stream(
    tmp_path_factory: pytest.TempPathFactory, shards: list[Documents], data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    write(directory, "train", shards)
    stream = TokenStream(directory, "train", len(shards))
    everything = list(chain.from_iterable(shards))
    flat = list(chain.from_iterable(everything))
    assert (stream.num_documents, stream.num_tokens) == (len(everything), len(flat))
    assert [stream.document(i).tolist() for i in range(len(everything))] == everything
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    found = stream.tokens(start, stop)
    assert found.dtype == np.uint16
    assert found.tolist() == flat[start:stop]


def test_places_outside_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", [[[1, 2]], [[3]]])
    stream = TokenStream(tmp_path, "train", 2)
    for start, stop in ((-1, 1), (0, 4), (2, 1)):
        with pytest.raises(IndexError):
            stream.tokens(start, stop)
    for i in (-1, 2):
        with pytest.raises(IndexError):
            stream.document(i)


def test_shards_of_different_types_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", [[[1]], [[2]]])
    write(tmp_path, "other", [[[1]], [[2]]], np.int32)
    for suffix in ("bin", "idx"):
        (tmp_path / f"other-00001-of-00002.{suffix}").rename(tmp_path / f"train-00001-of-00002.{suffix}")
    with pytest.raises(
        TokenFormerError, match=r"train-00001-of-00002.idx: tokens are int32, expected uint16 as"
    ):
        TokenStream(tmp_path, "train", 2)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A data directory whose training documents lie in two shards."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40)))
    data = prepare([tmp_path / "a.jsonl"], tmp_path / "data", tokenizer="byte", validation_fraction=0.3)
    train = data.split("train")
    parts = [
        [train.document(i).tolist() for i in range(*place)] for place in ((0, 7), (7, train.num_documents))
    ]
    write(data.path, "train", parts)
    info = json.loads((data.path / DATASET_FILE).read_text())
    info["splits"]["train"]["shards"] = 2
    (data.path / DATASET_FILE).write_text(json.dumps(info))
    return data.path


def test_a_sharded_data_directory_holds_the_same(sharded: Path) -> None:
    whole = TokenStream(sharded, "train")
    for suffix in ("bin", "idx"):
        (sharded / f"train.{suffix}").unlink()
    opened = DataDirectory.open(sharded).split("train")
    assert len(opened.shards) == 2
    assert opened.tokens(0, opened.num_tokens).tolist() == whole.tokens(0, whole.num_tokens).tolist()


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "train-00001-of-00002.idx").unlink()
    with pytest.raises(TokenFormerError, match=r"train-00001-of-00002.idx: cannot be read \(No such file"):
        DataDirectory.open(sharded)


def test_shards_that_hold_something_else_are_refused(sharded: Path) -> None:
    write(sharded, "train", [[[1]], [[2]]])
    with pytest.raises(
        TokenFormerError, match="train: its 2 shards: hold 2 documents and 2 tokens, expected"
    ):
        DataDirectory.open(sharded)
