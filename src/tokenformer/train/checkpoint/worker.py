"""A process beside the training that does what the training should not wait for.

``python -m tokenformer.train.checkpoint.worker CONNECTION PARENT MODULE`` is that process: it calls what it is sent,
one call after the other, and ends with the training process, however that ends.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from tokenformer.errors import TokenFormerError
from tokenformer.train.interrupts import STOP_SIGNALS

Value = TypeVar("Value")

_NICE = 10
_LOOKS_EVERY = 0.2
_ATTEMPTS = 2
_PATIENCE = 5.0
"""Seconds."""


class Worker:
    """Calls functions in a process of its own, with low priority and without devices; one call at a time.

    The process begins with the first call, or :meth:`start`. Where it is killed, it is started again and the call made
    once more; so calls must bear repetition.

    Args:
        name: what it does, for messages.
        module: of the functions; it is imported while the process begins.
        descriptors: open files that it inherits under their numbers.
        say: prints a line for the user.
    """

    def __init__(
        self,
        name: str,
        module: str = __name__,
        *,
        descriptors: Sequence[int] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        self._name = name
        self._module = module
        self._descriptors = tuple(descriptors)
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._closed = False
        self._calling = False
        self._starting = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Of the process, None where there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> Connection:
        """Begin the process, if there is none, without waiting until it is ready.

        Raises:
            OSError: the system refuses another process.
        """
        with self._starting:
            if self._process is None or self._connection is None:
                self._process, self._connection = self._begin()
                self._closed = False
            return self._connection

    def _begin(self) -> tuple[subprocess.Popen[bytes], Connection]:
        here, there = socket.socketpair()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # noqa: PTH109
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        # it must not get a signal before it ignores them; what is blocked here stays so in it
        former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            with there:
                process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        __name__,
                        str(there.fileno()),
                        str(os.getpid()),
                        self._module,
                    ],
                    pass_fds=(there.fileno(), *self._descriptors),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
        except BaseException:
            here.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        return process, Connection(here.detach())

    def call(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """``function(*arguments)`` in the process; the function is one of a module's, arguments and value are pickled.

        Raises:
            TokenFormerError: the process was killed twice.
            OSError, TokenFormerError: as ``function`` raises them; RuntimeError for anything else that it raises.
        """
        ends: list[str] = []
        for _ in range(_ATTEMPTS):
            connection = self.start()
            self._calling = True
            try:
                connection.send((function, arguments))
                value, error = connection.recv()
            except (EOFError, OSError):
                ends.append(self._bury())
                if self._closed:
                    break
                self._say(f"the process that {self._name} {ends[-1]}; it is started once more")
            else:
                if error is not None:
                    raise error
                return value
            finally:
                self._calling = False
        raise TokenFormerError(
            f"the process that {self._name} {' and then '.join(ends)} (where memory is short the system kills some)"
        )

    def close(self) -> None:
        """End the process; in the middle of a call it has some seconds to complete it."""
        self._closed = True
        process = self._process
        if process is not None and not self._calling:
            process.kill()  # it has nothing to do, or is still at its imports
        if self._connection is not None:
            # a thread that waits for an answer wakes up, and the process sees the end
            with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)
        self._bury()

    def _bury(self) -> str:
        """Wait for the end of the process, and say how it ended."""
        with self._starting:
            process, self._process = self._process, None
            connection, self._connection = self._connection, None
        if process is None:
            return "is gone"
        if connection is not None:
            connection.close()
        try:
            code = process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def main() -> None:
    """Serve the calls of the process that started this one."""
    for number in STOP_SIGNALS:  # meant for the training process, which tells this one what to do
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    importlib.import_module(sys.argv[3])  # takes seconds where it needs torch, and far more with low priority
    with suppress(OSError):
        os.nice(_NICE)
    with suppress(EOFError, ConnectionError):
        while True:
            function, arguments = connection.recv()
            connection.send(_outcome(function, arguments))
    os._exit(0)  # nothing is left to tidy up, and torch takes its time


def _outcome(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, Exception | None]:
    try:
        return function(*arguments), None
    except (OSError, TokenFormerError) as error:
        return None, error
    except Exception as error:
        return None, RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: data workers may keep the other end of the connection open."""
    while os.getppid() == parent:
        time.sleep(_LOOKS_EVERY)
    os._exit(1)


if __name__ == "__main__":
    main()
