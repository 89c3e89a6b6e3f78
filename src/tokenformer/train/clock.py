"""Time spent training, without evaluation and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class TrainingClock:
    """Seconds of training on ``device``, counted on from ``seconds``; it runs from the start."""

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device = device
        self._seconds = seconds
        self._since = time.perf_counter()

    def read(self) -> float:
        """Seconds so far; work still queued on the device is not waited for."""
        return self._seconds + time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still while the block runs, once the device has done what was queued before."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds = self.read()
        try:
            yield
        finally:
            self._since = time.perf_counter()
