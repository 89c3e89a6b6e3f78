"""Batches: the same samples for any cut into ranks, workers and runs, and what happens when reading fails."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.errors import DataError
from tokenformer.language.packing import DocumentWindows
from tokenformer.language.pipeline import TokenBatch, TrainingSamples
from tokenformer.language.token_stream import TokenStream
from tokenformer.language.windows import IGNORED, PADDING_DOCUMENT, StreamWindows
from tokenformer.train.micro_batches import MicroBatches

T = 10
StreamOf = Callable[..., TokenStream]


def make(stream_of: StreamOf, kind: str, seed: int = 3) -> TrainingSamples:
    """Plain windows, a mixture of three streams, or packed documents; all with small epochs."""
    if kind == "documents":
        return TrainingSamples([DocumentWindows(stream_of(300, 2), T)], [1], seed)
    if kind == "mixture":
        streams = [stream_of(101), stream_of(201, 3, 1000), stream_of(58, 1, 5000)]
        return TrainingSamples([StreamWindows(stream, T) for stream in streams], [0.5, 0.3, 0.2], seed)
    return TrainingSamples([StreamWindows(stream_of(300, 2), T)], [1], seed)


def rows(batches: Iterator[TokenBatch], number: int) -> list[tuple[list[int], ...]]:
    """What is trained on in the next ``number`` batches, row by row; empty passes left out."""
    found = []
    for inputs, targets, documents, _ in islice(batches, number):
        assert inputs.dtype == targets.dtype == np.int64
        assert inputs.flags.c_contiguous
        assert targets.flags.c_contiguous
        for row in range(len(inputs)):
            if (targets[row] != IGNORED).any():
                parts = (inputs[row], targets[row], *([] if documents is None else [documents[row]]))
                found.append(tuple(part.tolist() for part in parts))
    return found


kinds = pytest.mark.parametrize("kind", ["windows", "mixture", "documents"])


@kinds
@given(
    start=st.one_of(st.integers(0, 500), st.integers(0, 2**45)),
    sequences=st.integers(1, 12),
    micro=st.integers(1, 12),
    ranks=st.integers(1, 8),
)
def test_ranks_and_micro_batches_share_the_samples_of_one_process(
    stream_of: StreamOf, kind: str, start: int, sequences: int, micro: int, ranks: int
) -> None:
    samples = make(stream_of, kind)
    expected = rows(iter([samples.read(range(start, start + 2 * sequences))]), 1)
    found: list[list[tuple[list[int], ...]]] = [[], []]
    for rank in range(ranks):
        passes = MicroBatches(start, sequences, micro, rank, ranks)
        per_step = passes.per_step
        for step in range(2):
            own = (samples.read(passes(k)) for k in range(step * per_step, (step + 1) * per_step))
            found[step] += rows(own, per_step)
    assert found[0] + found[1] == expected


@kinds
def test_a_resume_with_other_ranks_goes_on_exactly(stream_of: StreamOf, kind: str) -> None:
    with closing(make(stream_of, kind).batches(MicroBatches(7, 6, 4))) as batches:
        whole = rows(batches, 8)
    found = []
    for start, ranks in ((7, 2), (7 + 12, 3)):  # two steps each, in a new process with other ranks
        shares: list[list[list[tuple[list[int], ...]]]] = []
        for rank in range(ranks):
            passes = MicroBatches(start, 6, 1, rank, ranks)
            with closing(make(stream_of, kind).batches(passes)) as batches:
                shares.append([rows(batches, passes.per_step) for _ in range(2)])
        found += [row for step in range(2) for share in shares for row in share[step]]
    assert found == whole


@kinds
def test_worker_processes_read_the_same(stream_of: StreamOf, kind: str) -> None:
    expected = [make(stream_of, kind).read(range(5 + 3 * k, 8 + 3 * k)) for k in range(7)]
    with closing(make(stream_of, kind).batches(MicroBatches(5, 3, 3), workers=2)) as batches:
        found = list(islice(batches, 7))
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.inputs, other.inputs)
        assert np.array_equal(one.targets, other.targets)
        assert (one.documents is None) == (other.documents is None)
        assert one.documents is None or np.array_equal(one.documents, other.documents)


@kinds
def test_a_pass_without_samples_has_no_targets(stream_of: StreamOf, kind: str) -> None:
    batch = make(stream_of, kind).read(range(4, 4))
    assert batch.inputs.shape == (1, T)
    assert (batch.targets == IGNORED).all()
    assert not batch.inputs.any()
    assert batch.documents is None or (batch.documents == PADDING_DOCUMENT).all()


def test_a_worker_that_is_killed_is_replaced_where_the_batches_go_on(stream_of: StreamOf) -> None:
    samples = make(stream_of, "windows")
    with closing(samples.batches(MicroBatches(0, 4, 4), workers=2)) as batches:
        found = list(islice(batches, 3))
        for worker in multiprocessing.active_children():
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
        found += islice(batches, 12)  # more than had been read ahead
    assert samples.restarts >= 1
    expected = [samples.read(range(4 * k, 4 * k + 4)) for k in range(15)]
    assert all(np.array_equal(one.inputs, other.inputs) for one, other in zip(found, expected, strict=True))


class _Fatal:
    """Ends the process that asks for it, unless that is the test's own."""

    def __init__(self) -> None:
        self.own = os.getpid()

    def __call__(self, k: int) -> range:
        if os.getpid() != self.own:
            os.kill(os.getpid(), signal.SIGKILL)
        return range(k, k + 1)


def test_workers_that_always_die_end_with_a_message(
    stream_of: StreamOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenformer.language.pipeline._MOST_RESTARTS", 1)
    samples = make(stream_of, "windows")
    with (
        closing(samples.batches(_Fatal(), workers=1)) as batches,
        pytest.raises(DataError, match="the 1 processes that read the data died 2 times in a row"),
    ):
        next(batches)
    assert samples.restarts == 1


def test_reading_ahead_ends_with_its_iterator(stream_of: StreamOf) -> None:
    def running() -> int:
        return sum(thread.name.startswith("grain") for thread in threading.enumerate())

    samples = make(stream_of, "windows")
    before = running()
    closed, dropped = (samples.batches(MicroBatches(0, 4, 4)) for _ in range(2))
    next(closed), next(dropped)
    assert running() > before
    closed.close()
    del dropped
    gc.collect()
    deadline = time.monotonic() + 10
    while running() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_good_batches_come_before_the_error(stream_of: StreamOf, tmp_path, workers: int) -> None:  # type: ignore[no-untyped-def]
    """A shard is cut off: every batch before its hole still comes, then the error names file and byte."""
    original = stream_of(300)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{original.prefix}{suffix}", tmp_path / f"train{suffix}")
    samples = TrainingSamples([StreamWindows(TokenStream(tmp_path, "train"), T)], [1], 0)
    expected = [samples.read(range(k, k + 1)) for k in range(29)]
    os.truncate(tmp_path / "train.bin", 4 * 200)
    intact = next(k for k, batch in enumerate(expected) if batch.targets.max() >= 200)
    found: list[TokenBatch] = []
    with (
        closing(samples.batches(MicroBatches(0, 1, 1), workers=workers)) as batches,
        pytest.raises(
            DataError, match=r"train\.bin: cut off: holds 800 bytes, expected 1200, while reading at byte"
        ),
    ):
        found.extend(batches)
    assert len(found) <= intact
    assert workers or len(found) == intact
    assert all(np.array_equal(one.inputs, other.inputs) for one, other in zip(found, expected, strict=False))
