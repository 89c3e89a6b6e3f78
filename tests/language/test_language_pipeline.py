"""The order of training windows, and the windows of validation."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenformer.errors import TokenFormerError
from tokenformer.language.pipeline import IGNORED, TrainingWindows, ValidationWindows
from tokenformer.language.store_writer import TokenStoreWriter
from tokenformer.language.token_stream import TokenStream

MakeStore = Callable[[int], TokenStream]


@pytest.fixture(scope="module")
def store_of(tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    """A store of the tokens 0, 1, 2, ..., in documents of seven."""
    folder = tmp_path_factory.mktemp("stores")

    def make(length: int) -> TokenStream:
        prefix = folder / str(length)
        if not Path(f"{prefix}.idx").exists():
            with TokenStoreWriter(prefix, np.int32) as writer:
                for start in range(0, length, 7):
                    writer.add_document(np.arange(start, min(start + 7, length)))
        return TokenStream(folder, str(length))

    return make


def consecutive(start: int, size: int) -> Callable[[int], range]:
    """Batches of ``size`` samples from ``start`` on."""
    return lambda k: range(start + k * size, start + (k + 1) * size)


lengths = st.integers(2, 300)
windows_of = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(length=lengths, t=windows_of, seed=seeds, epoch=st.one_of(st.integers(0, 3), st.integers(0, 2**40)))
def test_every_epoch_holds_every_window_once(
    store_of: MakeStore, length: int, t: int, seed: int, epoch: int
) -> None:
    if length < t + 1:
        return
    windows = TrainingWindows(store_of(length), t, seed)
    n = windows.windows_per_epoch
    assert n == (length - 1) // t
    samples = [windows[epoch * n + i] for i in range(n)]
    assert all(sample.dtype == np.int64 and sample.shape == (t + 1,) for sample in samples)
    assert all(np.array_equal(sample, sample[0] + np.arange(t + 1)) for sample in samples)
    assert sorted(int(sample[0]) for sample in samples) == [w * t for w in range(n)]


@settings(deadline=None, max_examples=40)
@given(
    length=lengths,
    seed=seeds,
    start=st.one_of(st.integers(0, 500), st.integers(0, 2**50)),
    size=st.integers(1, 9),
    other=st.integers(1, 9),
)
def test_batches_from_any_sample_are_the_samples_themselves(
    store_of: MakeStore, length: int, seed: int, start: int, size: int, other: int
) -> None:
    t = 1 + length // 20
    windows, fresh = (TrainingWindows(store_of(length), t, seed) for _ in range(2))
    for batch_size in (size, other):
        batches = windows.batches(consecutive(start, batch_size))
        for number, batch in enumerate(islice(batches, 3)):
            first = start + number * batch_size
            expected = np.stack([fresh[first + row] for row in range(batch_size)])
            assert batch.dtype == np.int64
            assert np.array_equal(batch, expected)
        batches.close()


def test_the_order_changes_with_epoch_and_seed(store_of: MakeStore) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        windows = TrainingWindows(store_of(10_001), 10, seed)
        return [int(windows[epoch * 1000 + i][0]) for i in range(1000)]

    orders = [order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 20
        assert np.mean(np.abs(np.diff(one)) < 100) < 0.1, "neighbours should not stay together"


def test_reading_ahead_ends_with_its_iterator(store_of: MakeStore) -> None:
    def running() -> int:
        return sum(thread.name.startswith("grain") for thread in threading.enumerate())

    windows = TrainingWindows(store_of(1000), 10, 0)
    before = running()
    closed = windows.batches(consecutive(0, 4))
    dropped = windows.batches(consecutive(0, 4))
    next(closed), next(dropped)
    assert running() > before
    closed.close()
    del dropped
    gc.collect()
    deadline = time.monotonic() + 10
    while running() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running() == before


def test_an_error_while_reading_reaches_the_consumer(
    store_of: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(1000)
    windows = TrainingWindows(store, 10, 0)

    def broken(start: int, stop: int) -> np.ndarray:
        raise OSError("disk gone")

    monkeypatch.setattr(store, "tokens", broken)
    with pytest.raises(OSError, match="disk gone"):
        next(windows.batches(consecutive(0, 4)))


def test_a_store_shorter_than_a_window_is_refused(store_of: MakeStore) -> None:
    assert TrainingWindows(store_of(11), 10, 0).windows_per_epoch == 1
    with pytest.raises(TokenFormerError, match=r"holds 10 tokens, expected at least 11 \(sequence_length 10"):
        TrainingWindows(store_of(10), 10, 0)
    with pytest.raises(TokenFormerError, match="holds 1 tokens, expected at least 2"):
        ValidationWindows(store_of(1), 10)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_refused(store_of: MakeStore, seed: int) -> None:
    with pytest.raises(TokenFormerError, match=f"seed: found {seed}, expected"):
        TrainingWindows(store_of(20), 10, seed)


def test_samples_count_from_zero(store_of: MakeStore) -> None:
    with pytest.raises(IndexError):
        TrainingWindows(store_of(20), 10, 0)[-1]


@settings(deadline=None)
@given(length=lengths, t=windows_of, limit=st.one_of(st.none(), st.integers(1, 400)))
def test_validation_predicts_every_token_but_the_first_once(
    store_of: MakeStore, length: int, t: int, limit: int | None
) -> None:
    windows = ValidationWindows(store_of(length), t, limit)
    expected = np.arange(1, length)[:limit]
    assert windows.num_targets == len(expected)
    found = [windows[i] for i in range(len(windows))]
    assert all(inputs.shape == targets.shape == (t,) for inputs, targets in found)
    targets = np.concatenate([window.targets for window in found])
    inputs = np.concatenate([window.inputs for window in found])
    counted = targets != IGNORED
    assert targets[counted].tolist() == expected.tolist()
    assert inputs[counted].tolist() == (expected - 1).tolist()
    assert counted[: len(expected)].all()
    assert not inputs[~counted].any()
    with pytest.raises(IndexError):
        windows[len(windows)]
