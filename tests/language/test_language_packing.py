"""Packed documents: each token once, never across documents, hardly any padding, and as if each stood alone."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.errors import TokenFormerError
from tokenformer.language.loss import Batch, loss_sum
from tokenformer.language.packing import DocumentWindows, pack_lengths
from tokenformer.language.pipeline import TrainingSamples
from tokenformer.language.store import shard_prefixes
from tokenformer.language.store_writer import TokenStoreWriter
from tokenformer.language.token_stream import TokenStream
from tokenformer.language.windows import IGNORED, PADDING_DOCUMENT
from tokenformer.models.base import LanguageModel


@given(
    capacity=st.integers(1, 60),
    counts=st.dictionaries(st.integers(1, 60), st.integers(0, 500), max_size=30),
)
def test_every_piece_is_packed_and_every_window_fits(capacity: int, counts: dict[int, int]) -> None:
    histogram = np.zeros(capacity + 1, np.int64)
    for length, count in counts.items():
        histogram[min(length, capacity)] += count
    packed: Counter[int] = Counter()
    windows = 0
    for number, parts in pack_lengths(histogram, capacity):
        assert number > 0
        assert sum(length * copies for length, copies in parts) <= capacity
        windows += number
        for length, copies in parts:
            packed[length] += number * copies
    assert packed == Counter({length: int(count) for length, count in enumerate(histogram) if count})
    total = int((histogram * np.arange(capacity + 1)).sum())
    # at most one window is less than half full, or two of them would have been one
    assert windows <= 2 * total / capacity + 1


def test_lengths_as_of_a_real_corpus_leave_hardly_any_padding() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 200_000).astype(np.int64) + 1
    counts = np.bincount(lengths[lengths <= 2048], minlength=2049)
    windows = sum(pattern.windows for pattern in pack_lengths(counts, 2048))
    assert (counts * np.arange(2049)).sum() / (windows * 2048) > 0.999


def make_windows(folder: Path, shards: list[list[list[int]]], t: int) -> DocumentWindows:
    for prefix, documents in zip(shard_prefixes(folder, "train", len(shards)), shards, strict=True):
        with TokenStoreWriter(prefix, np.uint16) as writer:
            for document in documents:
                writer.add_document(np.array(document, np.int64))
    return DocumentWindows(TokenStream(folder, "train", len(shards)), t)


def read(windows: DocumentWindows, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    inputs, targets, documents = np.full((3, windows.sequence_length), -7, np.int64)
    windows.read(index, inputs, targets, documents)
    return inputs, targets, documents


@given(
    lengths=st.lists(st.lists(st.integers(0, 40), max_size=15), min_size=1, max_size=3),
    t=st.integers(1, 16),
)
def test_every_token_is_a_target_once_and_stays_in_its_document(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], t: int
) -> None:
    counter = iter(range(2**16))
    shards = [[[next(counter) for _ in range(length)] for length in shard] for shard in lengths]
    documents = [document for shard in shards for document in shard]
    folder = tmp_path_factory.mktemp("packing")
    if not any(len(document) > 1 for document in documents):
        with pytest.raises(TokenFormerError, match="holds no document of two tokens"):
            make_windows(folder, shards, t)
        return
    windows = make_windows(folder, shards, t)
    expected = [pair for document in documents for pair in pairwise(document)]  # (input, target)
    found = []
    for index in range(len(windows)):
        inputs, targets, ids = read(windows, index)
        real = ids != PADDING_DOCUMENT
        assert ids[real].tolist() == sorted(ids[real].tolist()), "documents lie one after the other"
        assert (targets[~real] == IGNORED).all()
        assert not inputs[~real].any()
        assert real[: real.sum()].all(), "padding comes last"
        found += zip(inputs[real].tolist(), targets[real].tolist(), strict=True)
        whole = {document[0]: document for document in documents if document}
        for number in set(ids[real].tolist()):
            piece = inputs[ids == number].tolist()
            if piece[0] in whole and len(whole[piece[0]]) - 1 <= t:
                assert piece == whole[piece[0]][:-1], "a document that fits is not cut"
    assert sorted(found) == sorted(expected)
    assert windows.fill == pytest.approx(len(expected) / (len(windows) * t))


def test_the_plan_is_the_same_in_another_process(tmp_path: Path) -> None:
    windows = make_windows(tmp_path, [[list(range(n)) for n in (5, 3, 9, 2, 30, 4)]], 8)
    sent = pickle.dumps(windows)
    other = pickle.loads(sent)  # noqa: S301
    assert "_plan" not in other.__dict__
    assert len(other) == len(windows)
    for index in range(len(windows)):
        for one, two in zip(read(windows, index), read(other, index), strict=True):
            assert np.array_equal(one, two)


@pytest.fixture(params=["tokenformer", "transformer"])
def model(
    request: pytest.FixtureRequest,
    make_tokenformer: Callable[..., LanguageModel],
    make_transformer: Callable[..., LanguageModel],
) -> LanguageModel:
    return make_tokenformer() if request.param == "tokenformer" else make_transformer()


def test_a_packed_window_gives_what_its_documents_give_alone(model: LanguageModel, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    documents = [generator.integers(0, 40, n).tolist() for n in (6, 13, 4, 9, 50, 3, 7, 21)]
    windows = make_windows(tmp_path, [documents], 24)
    samples = TrainingSamples([windows], [1], 0)
    inputs, targets, ids, _ = (
        torch.from_numpy(part) if isinstance(part, np.ndarray) else part
        for part in samples.read(range(len(windows)))
    )
    assert isinstance(ids, torch.Tensor)
    with torch.no_grad():
        packed = model(inputs, documents=ids).logits
        total = loss_sum(model, Batch(inputs, targets, ids))
        nats, count = 0.0, 0
        for row in range(len(inputs)):
            for number in range(int(ids[row].max()) + 1):
                place = ids[row] == number
                alone = model(inputs[row][place][None]).logits[0]
                torch.testing.assert_close(packed[row][place], alone, rtol=1e-4, atol=1e-5)
                nats += torch.nn.functional.cross_entropy(alone, targets[row][place], reduction="sum").item()
                count += int(place.sum())
    assert count == sum(len(document) - 1 for document in documents)
    assert int(total.count) == count
    assert total.nats.item() == pytest.approx(nats, rel=1e-5)
