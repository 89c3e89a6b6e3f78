"""The same bytes whatever the number of workers, the size of the blocks and the engine."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.preparation import blocks
from tokenformer.language.preparation.engines import LocalEngine
from tokenformer.language.prepare import prepare
from tokenformer.language.rules import DocumentRules
from tokenformer.language.store import shard_prefixes
from tokenformer.language.tokenizers import load_tokenizer


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "a.txt").write_text("".join(f"some words, größe {i}\n" for i in range(200)))
    prepare([folder / "a.txt"], folder / "data", tokenizer="bpe:300")
    return folder / "data" / "tokenizer.json"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with 34 duplicates and a broken line."""
    draw = random.Random(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [f"some {draw.randrange(60)} words " * draw.randrange(1, 30) for _ in range(120)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "a.jsonl").write_text("\n".join([*lines[:50], "{", *lines[50:]]))
    (folder / "b.txt").write_text("some words in many lines,\n größe\n" * 60)
    (folder / "c.jsonl").write_text("\n".join(reversed(lines[:30])))
    return folder


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 3000)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("deduplicate", [False, True])
def test_the_number_of_workers_changes_nothing(
    corpus: Path, tmp_path: Path, bpe: Path, deduplicate: bool
) -> None:
    rules = DocumentRules(deduplicate=deduplicate, on_error="skip")
    made = {}
    for workers in (1, 2, 3) if deduplicate else (1, 2):
        out = tmp_path / f"{workers}"
        data = prepare([corpus], out, tokenizer=bpe, rules=rules, engine=LocalEngine(workers))
        assert data.info.skipped.get("duplicate", 0) == (34 if deduplicate else 0)
        made[workers] = files_of(out)
    assert all(files == made[1] for files in made.values())
    assert len(made[1]["train.bin"]) > 10_000


def read_all(data: DataDirectory) -> dict[str, list[list[int]]]:
    return {
        name: [data.split(name).document(i).tolist() for i in range(data.split(name).num_documents)]
        for name in data.info.splits
    }


@settings(max_examples=40)
@given(
    texts=st.lists(
        st.text(st.sampled_from("ab é😀\n"), min_size=1, max_size=30), min_size=2, max_size=12, unique=True
    ),
    size=st.integers(1, 60),
    long=st.integers(1, 40),
    shard_tokens=st.integers(1, 80),
    fraction=st.floats(0.05, 0.9),
)
def test_blocks_pieces_and_shards_change_no_token(
    tmp_path_factory: pytest.TempPathFactory,
    bpe: Path,
    texts: list[str],
    size: int,
    long: int,
    shard_tokens: int,
    fraction: float,
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    (folder / "a.json").write_text(json.dumps(texts))
    options = {"tokenizer": bpe, "validation_fraction": fraction, "engine": LocalEngine(1)}
    try:
        expected = prepare([folder / "a.json"], folder / "whole", **options)  # type: ignore[arg-type]
    except TokenFormerError as error:
        assert "too few to divide" in str(error)  # noqa: PT017
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocks, "BLOCK_CHARACTERS", size)
        patched.setattr("tokenformer.language.pieces.LONG", long)
        patched.setattr("tokenformer.language.pieces._PIECE", 1 + long // 2)
        found = prepare([folder / "a.json"], folder / "cut", shard_tokens=shard_tokens, **options)  # type: ignore[arg-type]
    assert read_all(found) == read_all(expected)
    assert found.info.corpus_sha256 == expected.info.corpus_sha256
    tokenizer = load_tokenizer(bpe)
    for name, documents in read_all(found).items():
        stored = found.split(name)
        whole = tokenizer.encode_batch([tokenizer.decode(document[:-1]) for document in documents])
        assert [ids.tolist() for ids in whole] == [document[:-1] for document in documents]
        sizes = [np.fromfile(f"{prefix}.bin", "<u2") for prefix in _prefixes(found, name)]
        assert np.concatenate(sizes).tolist() == stored.tokens(0, stored.num_tokens).tolist()
        for shard, tokens in enumerate(sizes):
            documents_inside = int((tokens == tokenizer.eos_token_id).sum())
            assert len(tokens) <= shard_tokens or documents_inside == 1
            if shard:  # the document that begins here had no room in the shard before
                first = int(np.argmax(tokens == tokenizer.eos_token_id)) + 1
                assert len(sizes[shard - 1]) + first > shard_tokens


def _prefixes(data: DataDirectory, split: str) -> list[Path]:
    return shard_prefixes(data.path, split, data.info.splits[split].shards)


def test_one_long_text_is_worked_on_in_parallel_pieces(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("some words, größe and others\n" * 1000)
    expected = prepare([tmp_path / "a.txt"], tmp_path / "whole", tokenizer=bpe)
    for name, value in (("LONG", 3000), ("_PIECE", 1000)):
        monkeypatch.setattr(f"tokenformer.language.pieces.{name}", value)
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 2000)
    counted = []
    run = LocalEngine.map_ordered

    def watched(self: LocalEngine, function: Callable, items: Iterator) -> Iterator:  # type: ignore[type-arg]
        return run(self, function, (counted.append(item) or item for item in items))  # type: ignore[func-returns-value]

    monkeypatch.setattr(LocalEngine, "map_ordered", watched)
    found = prepare([tmp_path / "a.txt"], tmp_path / "pieces", tokenizer=bpe, engine=LocalEngine(1))
    assert len(counted) > 10
    assert files_of(found.path) == files_of(expected.path)


class TestLocalEngine:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_results_come_in_order_and_few_items_wait(self, workers: int) -> None:
        taken = 0

        def items() -> Iterator[tuple[int, float]]:
            nonlocal taken
            for number in range(20):
                taken += 1
                yield number, float(number)

        for count, (key, result) in enumerate(LocalEngine(workers).map_ordered(abs, items()), start=1):
            assert (key, result) == (count - 1, count - 1.0)
            assert taken <= count + 2 * workers
        assert count == 20

    def test_a_single_item_starts_no_process(self) -> None:
        ((_, result),) = LocalEngine(4).map_ordered(lambda argument: argument + os.getpid(), [(0, 1)])
        assert result == 1 + os.getpid()
        assert list(LocalEngine(4).map_ordered(abs, [])) == []

    def test_a_worker_that_is_killed_is_an_error(self) -> None:
        with pytest.raises(TokenFormerError, match="a worker process ended in the middle of its work"):
            list(LocalEngine(2).map_ordered(_kill_itself, [(0, 0), (1, 0), (2, 0)]))

    def test_errors_of_workers_and_of_the_source_of_items_come_through(self) -> None:
        with pytest.raises(TokenFormerError, match=r"^broken 0$"):
            list(LocalEngine(2).map_ordered(_fail, [(0, 0), (1, 1)]))

        def broken() -> Iterator[tuple[int, int]]:
            yield from ((0, 0), (1, 1))
            raise TokenFormerError("file:3: broken")

        with pytest.raises(TokenFormerError, match=r"^file:3: broken$"):
            list(LocalEngine(2).map_ordered(abs, broken()))

    def test_no_workers(self) -> None:
        with pytest.raises(TokenFormerError, match="workers: found 0, expected at least 1"):
            LocalEngine(0)


def _kill_itself(argument: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail(argument: int) -> None:
    raise TokenFormerError(f"broken {argument}")


@pytest.mark.usefixtures("small_blocks")
def test_broken_documents_are_named_as_in_one_process(corpus: Path, tmp_path: Path, bpe: Path) -> None:
    for workers in (1, 2):
        with pytest.raises(TokenFormerError, match=r"a\.jsonl:51: invalid JSON at column \d \([^)]*\)$"):
            prepare([corpus], tmp_path / "out", tokenizer=bpe, engine=LocalEngine(workers))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_shards_of_nothing_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenFormerError, match="shard_tokens: found 0, expected at least 1"):
        prepare([corpus], tmp_path / "out", shard_tokens=0)
