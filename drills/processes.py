"""Starting the training processes of the drills: forked from one that has imported everything, so that it is quick."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import NamedTuple

from drills.child import Kill, Orders, train_and_note

_TIMEOUT = 600.0
_PRELOADED = ["drills.child", "tokenformer.train.run", "tokenformer.train.checkpoint.writer"]


class End(NamedTuple):
    """How a training process ended: its exit code (-9: killed) and what it printed."""

    code: int
    words: str


class Trainer:
    """Runs ``train --resume`` in processes of their own."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)

    def train(
        self,
        recipe: Path,
        out: Path,
        kill: Kill | None = None,
        kill_in_step: int | None = None,
    ) -> End:
        """Train in one process, which kills itself as ``kill`` says, or in the given step (counted from 0)."""
        if kill_in_step is not None:
            kill = Kill("step", kill_in_step, 0.0)
        return self.train_ranks(recipe, out, [Orders(kill=kill)])[0]

    def train_ranks(self, recipe: Path, out: Path, orders: list[Orders]) -> list[End]:
        """Train in as many processes as there are ``orders``, rank by rank."""
        port = _free_port()
        started = []
        for rank, order in enumerate(orders):
            environment = {} if len(orders) == 1 else _environment(rank, len(orders), port)
            words = out.with_name(f"{out.name}.words-{rank}")
            words.unlink(missing_ok=True)
            process = self._context.Process(
                target=train_and_note, args=(str(recipe), str(out), str(words), environment, order)
            )
            process.start()
            started.append((process, words))
        ends = []
        for process, words in started:
            process.join(_TIMEOUT)
            if process.is_alive():
                for other, _ in started:
                    other.kill()
                raise TimeoutError(f"{out}: not done after {_TIMEOUT:.0f} s")
            ends.append(End(process.exitcode or 0, words.read_text() if words.exists() else ""))
        return ends


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
