"""One run at a time in a run directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from tokenformer.errors import TokenFormerError
from tokenformer.files import require_free

LOCK_FILE = ".lock"


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run directory, which is made where there is none, while the block runs.

    The lock is the process's own: it ends with it, however that ends, and its children do not hold it. Where the
    block raises and nothing was written, nothing is left.

    Raises:
        TokenFormerError: another process holds it (named with its host), or the directory cannot be written.
    """
    if not run.is_dir():
        require_free(run)
    made = [place for place in (run, *run.parents) if not place.exists()]
    path = run / LOCK_FILE
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
    except OSError as error:
        _remove_empty(made)
        raise TokenFormerError(f"{run}: could not be written ({error.strerror or error})") from error
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is locked: whoever waits for it finds out that it is gone
        os.close(descriptor)
        _remove_empty(made)


def is_in_use(run: Path) -> bool:
    """Whether ``run`` is a directory that holds anything but a lock."""
    return run.is_dir() and any(entry.name != LOCK_FILE for entry in run.iterdir())


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # of the process (POSIX), not of the open file: data workers that outlive it do not keep it
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # noqa: PTH116
                return descriptor
        except FileNotFoundError:  # its holder removed it meanwhile
            pass
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            raise TokenFormerError(_refusal(path.parent, holder)) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _refusal(run: Path, holder: bytes) -> str:
    try:
        found = json.loads(holder)
        who = f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        who = "a process that has just begun"
    return (
        f"{run}: another run is going on in this directory ({who}); wait for its end, or name another --out"
    )


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _remove_empty(made: list[Path]) -> None:
    for place in made:
        with suppress(OSError):
            place.rmdir()
