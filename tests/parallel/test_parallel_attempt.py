"""Ranks that start again meet in a place of their own, whatever the former ones left in the store."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from tokenformer.parallel.attempt import fresh_store

RANKS = 4


def attempt(store: dist.Store, late: int | None = None) -> list[dist.Store]:
    """All ranks of one attempt, in threads; ``late`` comes after the others."""
    places: dict[int, dist.Store] = {}

    def come(rank: int) -> None:
        if rank == late:
            time.sleep(0.3)
        places[rank] = fresh_store(store, rank, RANKS, timedelta(seconds=30))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [places[rank] for rank in range(RANKS)]


@pytest.mark.parametrize("late", [None, 0, 2])
def test_each_attempt_has_a_place_of_its_own(late: int | None) -> None:
    store = dist.HashStore()
    for number in range(3):
        places = attempt(store, late)
        assert not any(place.check(["address"]) for place in places)
        places[number].set("address", str(number))
        assert [place.get("address") for place in places] == [str(number).encode()] * RANKS


def test_a_rank_may_come_again_at_once() -> None:
    """Attempts that end as soon as they have begun, each rank in its own time: nobody is sent to a former place."""
    store, attempts = dist.HashStore(), 20
    places: dict[tuple[int, int], dist.Store] = {}

    def come(rank: int) -> None:
        for number in range(attempts):
            place = fresh_store(store, rank, 2, timedelta(seconds=30))
            place.set(f"number of {rank}", str(number))
            places[rank, number] = place
            if number % 3 == rank:
                time.sleep(0.02)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(places) == 2 * attempts
    for (_, number), place in places.items():
        assert [place.get(f"number of {rank}") for rank in range(2)] == [str(number).encode()] * 2


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2, 3\] did not come within 0 s"):
        fresh_store(dist.HashStore(), 0, RANKS, timedelta(seconds=0.2))
