"""Run under torchrun: trainings one after another, as a JSON file lists them; each rank writes how they ended."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tokenformer.errors import TokenFormerError
from tokenformer.parallel.launch import find_launch
from tokenformer.train.config import RunConfig
from tokenformer.train.interrupts import RunInterrupted
from tokenformer.train.run import train
from tokenformer.train.step import TrainStep


@contextmanager
def signal_after(steps: int | None, rank: int) -> Iterator[None]:
    """The last rank alone gets a SIGTERM in its ``steps``-th step."""
    if steps is None or rank != find_launch().world_size - 1:
        yield
        return
    take_step, left = TrainStep.__call__, steps

    def step(self: TrainStep, *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGTERM)
        return take_step(self, *arguments)

    with mock.patch.object(TrainStep, "__call__", step):
        yield


def run(job: dict[str, Any], rank: int) -> list[str]:
    """How the job ended: the name of the error and its words, or nothing."""
    try:
        with signal_after(job.get("stop_after"), rank):
            train(RunConfig.model_validate(job["config"]), job["out"], resume=True, quiet=True)
    except (TokenFormerError, RunInterrupted) as error:
        return [type(error).__name__, str(error)]
    return []


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs, rank = Path(sys.argv[1]), find_launch().rank
    outcomes = [run(job, rank) for job in json.loads(jobs.read_text())]
    jobs.with_name(f"rank-{rank}.json").write_text(json.dumps(outcomes))
