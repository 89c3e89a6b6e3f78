"""Blocks as Ray tasks, on a cluster or on this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tokenformer.errors import TokenFormerError
from tokenformer.language.preparation.engines import in_order

Key = TypeVar("Key")
Argument = TypeVar("Argument")
Result = TypeVar("Result")

_RETRIES = 10
_SECONDS_TO_CONNECT = 10


class RayEngine:
    """Tasks of one CPU each on a Ray cluster, where the same version of this package is installed.

    ``address`` is what ``ray.init`` takes (``auto``, ``HOST:PORT``, ``ray://HOST:PORT``); without one, the cluster
    of the environment (``RAY_ADDRESS``), else a cluster of this machine for as long as the work lasts. A session
    that is connected already is used as it is. Ray repeats the tasks of workers and machines that die.

    Raises:
        TokenFormerError: Ray is not installed, or its cluster cannot be reached; while it works, a task that
            failed again and again.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = address
        self._ray = _import_ray()

    def map_ordered(
        self, function: Callable[[Argument], Result], items: Iterable[tuple[Key, Argument]]
    ) -> Iterator[tuple[Key, Result]]:
        ray = self._ray
        connected_here = not ray.is_initialized()
        if connected_here:
            self._connect()
        try:
            shared = ray.put(function)
            task = ray.remote(max_retries=_RETRIES)(_apply)
            limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
            yield from in_order(items, lambda argument: task.remote(shared, argument), self._result, limit)
        finally:
            if connected_here:
                ray.shutdown()

    def _connect(self) -> None:
        _require_listening(self._address or os.environ.get("RAY_ADDRESS", ""))
        try:
            self._ray.init(address=self._address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
            where = self._address or os.environ.get("RAY_ADDRESS") or "this machine"
            raise TokenFormerError(f"ray: no cluster at {where} ({error})") from error

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TokenFormerError):
                raise error.cause from None
            if isinstance(error.cause, self._ray.exceptions.RayError):
                raise TokenFormerError(
                    f"ray: a task could not start; expected the same version of tokenformer on every machine "
                    f"({error.cause})"
                ) from error
            raise
        except self._ray.exceptions.RayError as error:  # what a task that is repeated in vain ends in
            raise TokenFormerError(f"ray: a task failed {_RETRIES + 1} times: {error}") from error


def _require_listening(address: str) -> None:
    """Refuse an address where nobody listens, which Ray itself finds out after minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # auto, local or none
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_CONNECT).close()
    except (OSError, ValueError) as error:
        raise TokenFormerError(f"ray: no cluster at {address} ({error})") from error


def _apply(function: Callable[[Any], Any], argument: Any) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one CPU
    return function(argument)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise TokenFormerError("--engine ray needs Ray; pip install 'tokenformer[ray]'") from error
    return ray
