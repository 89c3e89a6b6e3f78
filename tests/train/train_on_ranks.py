"""Run under torchrun: trainings one after another, as a JSON file lists them; each rank writes how they ended."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.loss import Batch, LossSum
from tokenformer.language.task import LanguageModelingTask
from tokenformer.models.base import LanguageModel
from tokenformer.parallel.launch import find_launch
from tokenformer.train.config import RunConfig
from tokenformer.train.interrupts import RunInterrupted
from tokenformer.train.micro_batches import MicroBatches
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


@contextmanager
def nan_in_steps(steps: list[int]) -> Iterator[None]:
    """The loss of this process is not a number in its steps ``steps`` (from 0)."""
    take_step, loss, number = TrainStep.__call__, LanguageModelingTask.loss, -1

    def step(self: TrainStep, *arguments: Any) -> Any:
        nonlocal number
        number += 1
        return take_step(self, *arguments)

    def sick(self: LanguageModelingTask, model: LanguageModel, batch: Batch) -> LossSum:
        healthy = loss(self, model, batch)
        return healthy._replace(nats=healthy.nats * float("nan")) if number in steps else healthy

    with (
        mock.patch.object(TrainStep, "__call__", step),
        mock.patch.object(LanguageModelingTask, "loss", sick),
    ):
        yield


@contextmanager
def bad_sample(config: RunConfig, index: int) -> Iterator[None]:
    """Sample ``index`` of the first stage triples the loss of its micro-batch, on whichever rank it comes up."""
    data = config.resolve()[0].data
    task = LanguageModelingTask(DataDirectory.open(str(data.path)), data.sequence_length, data.seed)
    with closing(task.batches(MicroBatches(index, 1, 1))) as batches:
        bad = next(batches).inputs[0]
    loss = LanguageModelingTask.loss

    def spiking(self: LanguageModelingTask, model: LanguageModel, batch: Batch) -> LossSum:
        healthy = loss(self, model, batch)
        return healthy._replace(nats=healthy.nats * (3 if (batch.inputs == bad).all(-1).any() else 1))

    with mock.patch.object(LanguageModelingTask, "loss", spiking):
        yield


def run(job: dict[str, Any], rank: int) -> list[str]:
    """How the job ended: the name of the error and its words, or nothing."""
    config = RunConfig.model_validate(job["config"])
    with ExitStack() as stack:
        stack.enter_context(signal_after(job.get("stop_after"), rank))
        if "nan_steps" in job and rank == 1:
            stack.enter_context(nan_in_steps(job["nan_steps"]))
        if "bad_sample" in job:
            stack.enter_context(bad_sample(config, job["bad_sample"]))
        if job.get("in_parts"):  # nothing may be read whole
            stack.enter_context(
                mock.patch("tokenformer.train.placement.read_checkpoint", side_effect=OSError)
            )
            stack.enter_context(mock.patch("tokenformer.train.climb.read_checkpoint", side_effect=OSError))
        try:
            train(config, job["out"], resume=True, quiet=True)
        except (TokenFormerError, RunInterrupted) as error:
            return [type(error).__name__, str(error)]
    return []


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs, rank = Path(sys.argv[1]), find_launch().rank
    outcomes = [run(job, rank) for job in json.loads(jobs.read_text())]
    jobs.with_name(f"rank-{rank}.json").write_text(json.dumps(outcomes))
