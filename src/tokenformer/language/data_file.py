"""A file read in pieces over a long time: what passes is tried again, what does not is an error with its place."""

from __future__ import annotations

import errno
import io
import os
import time
from pathlib import Path
from typing import Any

from tokenformer.errors import DataError, TokenFormerError

_PASSING_NAMES = (
    *("EIO", "EREMOTEIO", "ESTALE", "EAGAIN", "EINTR", "EBUSY", "ETIMEDOUT", "ENOBUFS"),
    *("ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ENOTCONN", "ESHUTDOWN"),
    *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH"),
)
_PASSING = {getattr(errno, name) for name in _PASSING_NAMES if hasattr(errno, name)}
"""What network disks and sick cables report, and often take back."""

RETRY_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 10, 10)
"""Pauses before a read is tried again; after the last one the error stands."""

LOOK_SECONDS = 1.0
"""How often it is looked whether the file is still there, whole."""


class DataFile:
    """Reads pieces of ``path`` at any place, from several threads, and after pickling from several processes.

    Pieces are read by system calls and not through a memory map, where a page that the file has lost, or that the
    disk cannot give, ends the process with SIGBUS. ``size`` in bytes is that of the beginning; ``retries`` counts
    the reads tried again in this process. ``what`` says in messages what the file was expected to be.

    Raises:
        TokenFormerError: the file cannot be opened.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.retries = 0
        try:
            self._file: io.FileIO | None = io.FileIO(path)
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise TokenFormerError(f"{path}: cannot be read ({error.strerror}); expected {what}") from error
        self._next_look = time.monotonic() + LOOK_SECONDS

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from byte ``offset`` on.

        Raises:
            DataError: the file is gone, is another one, ends too early, or cannot be read after several attempts; the
                message names file and byte.
        """
        for pause in (*RETRY_SECONDS, None):
            try:
                return self._read(offset, length)
            except OSError as error:
                self._file = None  # a stale handle never recovers; other threads may still hold it
                if error.errno not in _PASSING or pause is None:
                    tried = "" if error.errno not in _PASSING else f", tried {len(RETRY_SECONDS) + 1} times"
                    raise self._fault(offset, f"cannot be read ({error.strerror}{tried})") from error
                self.retries += 1
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _read(self, offset: int, length: int) -> bytes:
        if time.monotonic() >= self._next_look:
            self._look(offset)
        file = self._file
        if file is None:
            file = io.FileIO(self.path)
            self._look(offset)
            self._file = file
        found = os.pread(file.fileno(), length, offset)
        while len(found) < length:  # a signal, a limit of the file system, or the end
            more = os.pread(file.fileno(), length - len(found), offset + len(found))
            if not more:
                size = os.fstat(file.fileno()).st_size
                raise self._fault(offset, f"cut off: holds {size} bytes, expected {self.size}")
            found += more
        return found

    def _look(self, offset: int) -> None:
        """Whether the path still leads to a file of that size; an open file would outlive its name."""
        found = os.stat(self.path)  # noqa: PTH116  # a Path's own stat takes three times as long
        if found.st_size != self.size:
            state = "cut off" if found.st_size < self.size else "changed"
            raise self._fault(offset, f"{state}: holds {found.st_size} bytes, expected {self.size}")
        self._next_look = time.monotonic() + LOOK_SECONDS

    def _fault(self, offset: int, what: str) -> DataError:
        return DataError(f"{self.path}: {what}, while reading at byte {offset}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "retries": 0, "_next_look": 0.0}
