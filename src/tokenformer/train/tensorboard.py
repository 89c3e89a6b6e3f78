"""TensorBoard events whose failures are told as any other output's."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from tokenformer.errors import TokenFormerError


class TensorBoardEvents:
    """Scalars to event files in ``directory``; on going on, events from ``purge_step`` on no longer count.

    Raises:
        TokenFormerError: the disk refuses; so do :meth:`write` and :meth:`close`.
    """

    def __init__(self, directory: Path, purge_step: int | None) -> None:
        self._directory = directory
        self._former_hook = threading.excepthook
        threading.excepthook = self._ignore_refusals
        try:
            with self._told():
                self._writer = SummaryWriter(str(directory), purge_step=purge_step)
        except BaseException:
            threading.excepthook = self._former_hook
            raise

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers among ``values``."""
        with self._told():
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is queued and end the writer's thread."""
        try:
            with self._told():
                self._writer.close()
        finally:
            threading.excepthook = self._former_hook

    def _ignore_refusals(self, failure: threading.ExceptHookArgs) -> None:
        """The writer's thread hands its error to the next call here, so its own traceback says nothing new."""
        if not isinstance(failure.exc_value, OSError):
            self._former_hook(failure)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TokenFormerError(
                f"{self._directory}: could not be written ({error.strerror or error})"
            ) from error
