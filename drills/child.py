"""A training process that notes which samples each step reads, and that can be told when to kill itself.

The kill is SIGKILL, from a thread: nothing is flushed, closed or tidied up.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PHASES = ("step", "checkpoint", "export", "growth")


class Kill(NamedTuple):
    """``delay`` seconds into the ``occurrence``-th (from 0) call of ``phase`` in the process."""

    phase: str
    occurrence: int
    delay: float


def train_and_note(recipe: str, out: str, log: str, kill: Kill | None) -> None:
    """Train with ``--resume``; ``log`` gets a JSON line for each step's samples and for each phase's duration."""
    from tokenformer.train import run as run_module
    from tokenformer.train.checkpoint import export, writer
    from tokenformer.train.config import load_run_config
    from tokenformer.train.step import TrainStep

    notes = _Notes(Path(log), kill)
    TrainStep.__call__ = notes.noting_samples(TrainStep.__call__)  # type: ignore[method-assign]
    writer.write_contents = notes.timed("checkpoint", writer.write_contents)
    export.export_model = notes.timed("export", export.export_model)
    run_module.grow_for_stage = notes.timed("growth", run_module.grow_for_stage)
    run_module.train(load_run_config(recipe), out, resume=True, quiet=True)


class _Notes:
    def __init__(self, log: Path, kill: Kill | None) -> None:
        self._samples = log.open("a")
        self._durations = log.with_suffix(".durations").open("a")
        self._kill = kill
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

            def noted() -> Iterator[Any]:
                for batch in batches:
                    digest.update(batch.inputs.numpy().tobytes())
                    yield batch

            result = timed(trainer, noted(), *arguments)
            self._write(self._samples, {"stage": trainer.stage.name, "stage_step": arguments[0], "samples": digest.hexdigest()})
            return result

        return step

    def _write(self, file: Any, record: dict[str, Any]) -> None:
        file.write(json.dumps(record) + "\n")
        file.flush()

    def _arm(self, phase: str) -> None:
        occurrence = self._calls[phase]
        self._calls[phase] += 1
        if self._kill is not None and (phase, occurrence) == self._kill[:2]:
            timer = threading.Timer(self._kill.delay, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
