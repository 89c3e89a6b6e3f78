"""Where the blocks are worked on: in this process, in worker processes, or on a cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import connection
from typing import Any, Protocol, TypeVar

from tokenformer.errors import TokenFormerError

Key = TypeVar("Key")
Argument = TypeVar("Argument")
Result = TypeVar("Result")
Handle = TypeVar("Handle")


class Engine(Protocol):
    """Applies a function to many arguments, somewhere."""

    def map_ordered(
        self, function: Callable[[Argument], Result], items: Iterable[tuple[Key, Argument]]
    ) -> Iterator[tuple[Key, Result]]:
        """The key and the result of each item, in their order; few items are under way at a time.

        ``function`` and the arguments can be pickled; the keys stay here. Closing the iterator ends the work.
        """
        ...


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    items: Iterable[tuple[Key, Argument]],
    submit: Callable[[Argument], Handle],
    fetch: Callable[[Handle], Result],
    limit: int,
) -> Iterator[tuple[Key, Result]]:
    """Submit each item, at most ``limit`` before the oldest is fetched."""
    waiting: deque[tuple[Key, Handle]] = deque()
    for key, argument in items:
        waiting.append((key, submit(argument)))
        if len(waiting) >= limit:
            oldest, handle = waiting.popleft()
            yield oldest, fetch(handle)
    while waiting:
        oldest, handle = waiting.popleft()
        yield oldest, fetch(handle)


class LocalEngine:
    """Worker processes on this machine; with one worker, or a single item, this process itself.

    The processes are spawned, so a script that uses this needs the usual ``if __name__ == "__main__":``.

    Raises:
        TokenFormerError: fewer than one worker; while it works, a worker that was killed.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = usable_cores() if workers is None else workers
        if self._workers < 1:
            raise TokenFormerError(f"workers: found {workers}, expected at least 1")

    def map_ordered(
        self, function: Callable[[Argument], Result], items: Iterable[tuple[Key, Argument]]
    ) -> Iterator[tuple[Key, Result]]:
        items = iter(items)
        first = list(islice(items, 2 if self._workers > 1 else 0))
        items = chain(first, items)
        if len(first) < 2:
            return ((key, function(argument)) for key, argument in items)
        return self._in_processes(function, items)

    def _in_processes(
        self, function: Callable[[Argument], Result], items: Iterator[tuple[Key, Argument]]
    ) -> Iterator[tuple[Key, Result]]:
        pool = ProcessPoolExecutor(
            self._workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(function,),
        )
        try:
            yield from in_order(
                items, lambda argument: pool.submit(_work, argument), Future.result, 2 * self._workers
            )
        except BrokenProcessPool as error:
            raise TokenFormerError(
                "a worker process ended in the middle of its work (killed, or out of memory; fewer --workers "
                "need less)"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_function: Callable[[Any], Any]  # of a worker process: set once at its start


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers; its sentinel does."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(argument: Any) -> Any:
    return _function(argument)
