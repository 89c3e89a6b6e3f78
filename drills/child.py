"""A training process that notes which samples each step reads, and that can be told when to kill itself.

The kill is SIGKILL, from a thread: nothing is flushed, closed or tidied up.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

_FOREVER = 86400.0

PHASES = ("step", "checkpoint", "export", "growth")


class Kill(NamedTuple):
    """``delay`` seconds into the ``occurrence``-th (from 0) call of ``phase`` in the process."""

    phase: str
    occurrence: int
    delay: float


class Orders(NamedTuple):
    """What a training process does to itself: be killed; in step ``nan_step`` (from 0, of the process) have a loss
    that is not a number; in ``signal_step`` send itself ``signal_number``; in ``sleep_step`` sleep for ever."""

    kill: Kill | None = None
    nan_step: int | None = None
    signal_step: int | None = None
    signal_number: int = signal.SIGTERM
    sleep_step: int | None = None


def train_and_note(recipe: str, out: str, words: str, environment: dict[str, str], orders: Orders) -> None:
    """Train with ``--resume``; what is printed goes to ``words``, each step's samples and each phase's duration to
    files beside ``out``. The process ends with the exit code of the command line."""
    os.environ.update(environment)
    with open(words, "w", buffering=1) as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from tokenformer.cli.main import main
    from tokenformer.train import climb
    from tokenformer.train.checkpoint import export, writer
    from tokenformer.train.step import TrainStep

    notes = _Notes(out, orders)
    TrainStep.__call__ = notes.noting_samples(TrainStep.__call__)  # type: ignore[method-assign]
    writer.write_contents = notes.timed("checkpoint", writer.write_contents)
    export.export_model = notes.timed("export", export.export_model)
    climb.grow_for_stage = notes.timed("growth", climb.grow_for_stage)
    sys.argv = ["tokenformer", "train", recipe, "--out", out, "--resume"]
    main()


class _Notes:
    def __init__(self, out: str, orders: Orders) -> None:
        rank = os.environ.get("RANK", "0")
        self._samples = Path(f"{out}.samples-{rank}").open("a")  # noqa: SIM115
        self._durations = Path(f"{out}.durations-{rank}").open("a")  # noqa: SIM115
        self._orders = orders
        self._calls: Counter[str] = Counter()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._arm(phase)
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._write(self._durations, {"phase": phase, "seconds": time.perf_counter() - start})

        return call

    def noting_samples(self, take_step: Callable[..., Any]) -> Callable[..., Any]:
        timed = self.timed("step", take_step)

        def step(trainer: Any, batches: Iterator[Any], *arguments: Any) -> Any:
            digest = hashlib.sha256()
            number = self._calls["step"]
            if number == self._orders.signal_step:
                signal.raise_signal(self._orders.signal_number)
            if number == self._orders.sleep_step:
                time.sleep(_FOREVER)

            def noted() -> Iterator[Any]:
                for batch in batches:
                    digest.update(batch.inputs.numpy().tobytes())
                    yield batch

            with _nan_loss(trainer) if number == self._orders.nan_step else nullcontext():
                result = timed(trainer, noted(), *arguments)
            place = {"stage": trainer.stage.name, "stage_step": arguments[0]}
            self._write(self._samples, place | {"samples": digest.hexdigest()})
            return result

        return step

    def _write(self, file: Any, record: dict[str, Any]) -> None:
        file.write(json.dumps(record) + "\n")
        file.flush()

    def _arm(self, phase: str) -> None:
        occurrence = self._calls[phase]
        self._calls[phase] += 1
        kill = self._orders.kill
        if kill is not None and (phase, occurrence) == kill[:2]:
            timer = threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()


@contextmanager
def _nan_loss(trainer: Any) -> Iterator[None]:
    """The task's loss is not a number while the block runs, nor is any gradient."""
    loss = trainer.task.loss

    def sick(*arguments: Any, **options: Any) -> Any:
        healthy = loss(*arguments, **options)
        return healthy._replace(nats=healthy.nats * float("nan"))

    trainer.task.loss = sick
    try:
        yield
    finally:
        del trainer.task.loss
