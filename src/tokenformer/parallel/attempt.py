"""A part of the store that no earlier attempt of the same processes has written to."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_PAUSE = 0.05


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """``store`` under a prefix that all ranks of this attempt share and no other attempt has.

    torchrun keeps one store over its restarts (``--max-restarts``), with the addresses of processes that are gone; the
    restarts that it counts for its workers are not the same on all nodes. So each rank greets with a name of
    its own, and the first rank answers every new name until all of them have come to the same place.

    Raises:
        RuntimeError: not all ranks came within ``timeout``.
    """
    if rank == 0:
        place = uuid.uuid4().hex
        _gather(store, place, world_size, timeout)
    else:
        name = uuid.uuid4().hex
        store.set(f"greeting/{rank}", name)
        answer = f"answer/{name}"
        store.wait([answer], timeout)
        place = store.get(answer).decode()
        store.set(f"{place}/here/{rank}", "")
    return dist.PrefixStore(place, store)


def _gather(store: dist.Store, place: str, world_size: int, timeout: timedelta) -> None:
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for rank in sorted(missing):
            if not store.check([f"greeting/{rank}"]):
                continue
            name = store.get(f"greeting/{rank}").decode()  # of this attempt, or of one that is over
            if store.check(
                [f"{place}/here/{rank}"]
            ):  # asked after the name, which may be of the next attempt
                missing.discard(rank)
            else:
                store.set(f"answer/{name}", place)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(missing)} did not come within {timeout.total_seconds():.0f} s")
        if missing:
            time.sleep(_PAUSE)
