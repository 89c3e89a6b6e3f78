"""Which rank is behind: every rank tells the others how far it is, so that a hung collective ends with a name."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from tokenformer.errors import LostRankError

_SHARE_OF_TIMEOUT = 0.9  # before the collective itself gives up, whose message names no rank
_ASKING = timedelta(seconds=5)
_PERIODS_BEHIND, _PERIODS_LISTENED = 3, 2.5


class Pulse(NamedTuple):
    """How far a rank is: ``beats`` so far, the last at ``time`` (seconds since the epoch) in ``step``, where it began
    ``doing`` something; ``alive`` is when its process last said so, and ``place`` the line its main thread was at."""

    rank: int
    host: str
    pid: int
    beats: int
    step: int
    doing: str
    time: float
    alive: float
    place: str

    def describe(self, now: float) -> str:
        """One line for the user."""
        since = datetime.fromtimestamp(self.time).astimezone().strftime("%H:%M:%S")
        silent = now - self.alive
        gone = (
            f"; its process has not been heard of for {silent:.0f} s" if silent > _ASKING.seconds * 3 else ""
        )
        return (
            f"rank {self.rank} (process {self.pid} on {self.host}): step {self.step}, {self.doing} since {since}, "
            f"{now - self.time:.0f} s ago, at {self.place}{gone}"
        )


class Heartbeat:
    """Beats of this rank, and a thread that compares them with those of the others.

    A rank that has come no further for nine tenths of ``timeout``, while another has fewer beats or its process is
    silent, ends its process with the exit code of a
    :class:`~tokenformer.errors.LostRankError` and a message that names the rank that is behind. Where all stand
    at the same place, nothing is done: that may be a long compilation.

    Args:
        store: where the ranks meet; None for a process alone, which then does nothing.
        rank: of this process.
        world_size: of the run.
        timeout: seconds, as of the collectives.
        end: called with the message in place of ending the process.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        world_size: int,
        timeout: float,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._store = None if store is None else dist.PrefixStore("heartbeat", store)
        self._rank = rank
        self._world_size = world_size
        self._limit = _SHARE_OF_TIMEOUT * timeout
        self._period = min(_ASKING.total_seconds(), timeout / 20)
        self._end = end or _end_process
        self._stopped = threading.Event()
        self._stays = False
        self._thread: threading.Thread | None = None
        now = time.time()
        self._own = Pulse(rank, socket.gethostname(), os.getpid(), 0, 0, "starting", now, now, _place())

    def beat(self, step: int, doing: str) -> None:
        """Say that this rank is at ``step`` and begins ``doing`` something; costs nothing."""
        self._own = self._own._replace(beats=self._own.beats + 1, step=step, doing=doing, time=time.time())

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Say where the ranks are when a collective operation fails in the block: a rank is lost, or too late.

        Raises:
            LostRankError: in place of the error of the process group.
        """
        try:
            yield
        except RuntimeError as error:
            if self._store is None or not _is_collective(error):
                raise
            lost, where = "rank 0", "it no longer answers"  # which keeps the store, unless torchrun does
            with suppress(Exception):
                lost = self._name_lost()
                where = f"where the ranks were last:\n{self.diagnosis()}"
            raise LostRankError(
                f"rank {self._rank}: lost {lost} in step {self._own.step}, {self._own.doing} "
                f"({_in_short(error)}); {where}\nGo on from the last checkpoint with --resume"
            ) from error

    def diagnosis(self) -> str:
        """Where each rank is, the one that is behind first; empty for a process alone."""
        now = time.time()
        pulses = sorted(self._ask(), key=lambda pulse: (pulse.beats, pulse.alive))
        return "\n".join(f"  {pulse.describe(now)}" for pulse in pulses)

    def _name_lost(self) -> str:
        """The ranks whose processes say nothing while this one listens; those that fail as it does still speak."""
        self._stays = True  # what is told is where it failed
        before = {pulse.rank: pulse.alive for pulse in self._ask()}
        time.sleep(_PERIODS_LISTENED * self._period)
        silent = [pulse.rank for pulse in self._ask() if pulse.alive == before.get(pulse.rank)]
        silent = sorted(set(silent) - {self._rank})
        if not silent:
            return "touch with another rank"
        return f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"

    def __enter__(self) -> Heartbeat:
        if self._store is not None:
            self._tell()
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(self._period):
            try:
                self._tell()
                stuck = time.time() - self._own.time > self._limit
                behind = self._behind() if stuck else None
            except (dist.DistError, RuntimeError) as error:
                if self._stopped.wait(self._limit):  # the process that keeps the store is gone, or is leaving
                    return
                self._end(f"the first process of the run no longer answers ({_in_short(error)})")
                return
            if behind is not None:
                message = f"{self._why(behind)}:\n{self.diagnosis()}"
                if behind.rank == self._rank:  # the others say so first: its end would cut them off
                    self._stopped.wait(_PERIODS_BEHIND * self._period)
                self._end(message)
                return

    def _why(self, behind: Pulse) -> str:
        """The first line of the message."""
        now = time.time()
        waited = f"no step for {now - self._own.time:.0f} s"
        if now - behind.alive > self._limit:
            return f"lost rank {behind.rank}: {waited}, and no word from its process"
        return f"hung: {waited}, waiting for rank {behind.rank}"

    def _behind(self) -> Pulse | None:
        """The rank that all wait for: of fewer beats than another, or silent."""
        now = time.time()
        pulses = self._ask()
        silent = [pulse for pulse in pulses if now - pulse.alive > self._limit]
        first = min(silent or pulses, key=lambda pulse: pulse.beats)
        if silent or first.beats < max(pulse.beats for pulse in pulses):
            return first
        return None

    def _tell(self) -> None:
        assert self._store is not None
        place = self._own.place if self._stays else _place()
        self._own = self._own._replace(alive=time.time(), place=place)
        self._store.set(str(self._rank), json.dumps(self._own))

    def _ask(self) -> list[Pulse]:
        if self._store is None:
            return []
        pulses = [self._own]
        for rank in range(self._world_size):
            if rank != self._rank and self._store.check([str(rank)]):
                told: list[Any] = json.loads(self._store.get(str(rank)))
                pulses.append(Pulse(*told))
        return pulses


def _place() -> str:
    """The innermost line of Python that the main thread is at."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"{frame.f_code.co_qualname} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _in_short(error: Exception) -> str:
    """The first sentence; advice of libraries follows it."""
    return str(error).splitlines()[0].split(". ")[0]


def _is_collective(error: RuntimeError) -> bool:
    """Whether a process group failed; gloo has no type of error of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "NCCL" in str(error)


def _end_process(message: str) -> None:
    """The main thread waits inside a collective and cannot be reached: nothing less ends the process."""
    print(f"error: {message}\ngo on from the last checkpoint with --resume", file=sys.stderr, flush=True)
    os._exit(LostRankError.exit_code)
