"""SIGINT, SIGTERM and SIGUSR1 end a run between two steps, after a checkpoint, on all ranks alike."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what SLURM sends ahead of the time limit (``--signal=USR1@120``)."""

_FORWARDED_SECONDS = 5.0
_DATA_FAILED, _TROUBLE = 254, 255  # above every signal's number


class RunInterrupted(KeyboardInterrupt):
    """A run was asked to end; its checkpoint is written. The command line exits with 128 + ``signal_number``."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Whether the run was asked to end, and by which signal; or whether the data of a rank cannot be read any more.

    Args:
        agree: makes a number from 0 on the same on all ranks, their greatest; None for a process alone.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.signal_number: int | None = None
        self.data_failed = False
        self._agree = agree
        self._received = 0
        self._interrupted: float | None = None

    def receive(self, signal_number: int, frame: FrameType | None = None) -> None:
        """Note the signal. A second SIGINT ends the process at once, without a checkpoint; other signals may come
        as often as they like, as SLURM's do."""
        if signal_number == signal.SIGINT:
            if self._interrupted is not None and not self._is_forwarded(self._interrupted):
                raise KeyboardInterrupt
            self._interrupted = time.monotonic()
        self._received = self._received or signal_number

    def poll(self, *, trouble: bool = False, data_failed: bool = False) -> bool:
        """Bring ``signal_number`` and ``data_failed`` up to date; with several ranks all call it at the same place of
        the same step.

        Returns:
            Whether any rank reported ``trouble``; it goes before a signal.
        """
        number = _TROUBLE if trouble else _DATA_FAILED if data_failed else self._received
        number = number if self._agree is None else self._agree(number)
        if number == _TROUBLE:
            return True
        self.data_failed = number == _DATA_FAILED
        self.signal_number = None if self.data_failed else number or None
        return False

    def _is_forwarded(self, before: float) -> bool:
        """torchrun hands a Ctrl-C on that the terminal has given its workers already."""
        return "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - before < _FORWARDED_SECONDS


@contextmanager
def stop_requests(agree: Callable[[int], int] | None = None) -> Iterator[StopRequest]:
    """Catch the stop signals while the block runs; outside of the main thread signals are left as they are."""
    request = StopRequest(agree)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = {number: signal.signal(number, request.receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
