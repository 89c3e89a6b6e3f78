"""A rank that comes no further is named by those that wait for it, and by itself."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tokenformer.errors import LostRankError
from tokenformer.train.heartbeat import Heartbeat


class Ranks:
    """Heartbeats of several ranks in one process, over one store; ``ended`` has what each would have ended with."""

    def __init__(self, size: int, timeout: float) -> None:
        store = dist.HashStore()
        self.ended: dict[int, str] = {}
        self.done = threading.Event()
        self.beats = [Heartbeat(store, rank, size, timeout, end=self._ender(rank)) for rank in range(size)]

    def _ender(self, rank: int):  # type: ignore[no-untyped-def]
        def end(message: str) -> None:
            self.ended[rank] = message
            if len(self.ended) == len(self.beats):
                self.done.set()

        return end


@pytest.fixture
def ranks() -> Ranks:
    return Ranks(3, timeout=1.0)


def test_all_name_the_one_that_is_behind(ranks: Ranks) -> None:
    with ranks.beats[0], ranks.beats[1], ranks.beats[2]:
        for step in range(5):
            for rank, heart in enumerate(ranks.beats):
                if rank != 1 or step < 3:
                    heart.beat(step, "computing")
        ranks.beats[1].beat(3, "reading data")
        assert ranks.done.wait(30)
    for message in ranks.ended.values():
        assert "waiting for rank 1:\n  rank 1 (process" in message
        assert "step 3, reading data since" in message
        assert "wait (threading.py:" in message  # where the main thread is: waiting for this to happen


def test_ranks_that_are_busy_alike_are_left_alone(ranks: Ranks) -> None:
    """A long compilation, say: nobody is behind."""
    with ranks.beats[0], ranks.beats[1], ranks.beats[2]:
        for heart in ranks.beats:
            heart.beat(1, "computing")
        time.sleep(2)
    assert ranks.ended == {}


def test_silent_process_is_named(ranks: Ranks) -> None:
    """Stopped or gone: its thread says nothing any more, wherever it stood."""
    with ranks.beats[0], ranks.beats[2]:
        with ranks.beats[1]:
            for heart in ranks.beats:
                heart.beat(7, "computing")
        time.sleep(2.5)
    assert set(ranks.ended) == {0, 2}
    assert all(message.startswith("lost rank 1: no step for") for message in ranks.ended.values())


def test_collective_that_fails_names_the_silent_rank(ranks: Ranks) -> None:
    """Those that fail with it speak on until they have listened."""
    with ranks.beats[0], ranks.beats[2]:
        with ranks.beats[1]:
            for heart in ranks.beats:
                heart.beat(7, "computing")
        with pytest.raises(LostRankError) as caught, ranks.beats[0].explaining():
            raise RuntimeError("gloo: Connection closed by peer. This is typically caused by something")
    message = str(caught.value)
    assert "rank 0: lost rank 1 in step 7, computing (gloo: Connection closed by peer); where" in message
    assert all(f"rank {rank} (process" in message for rank in range(3))
    with pytest.raises(RuntimeError, match="another"), ranks.beats[0].explaining():
        raise RuntimeError("another fault")


def test_process_alone_does_nothing(tmp_path: Path) -> None:
    with Heartbeat(None, 0, 1, 0.1) as heart:
        heart.beat(1, "computing")
        time.sleep(0.3)
    assert heart.diagnosis() == ""
