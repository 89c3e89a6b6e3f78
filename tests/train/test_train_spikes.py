"""A loss spike: back to the checkpoint and past its data, the same after any restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.loss import Batch, LossSum, loss_sum
from tokenformer.language.task import LanguageModelingTask
from tokenformer.models.base import LanguageModel
from tokenformer.train.checkpoint.contents import read_checkpoint
from tokenformer.train.config import RunConfig
from tokenformer.train.metrics import read_metrics
from tokenformer.train.micro_batches import MicroBatches
from tokenformer.train.run import RunResult, train
from tokenformer.train.sections import SpikeConfig
from tokenformer.train.spikes import find_spike

MakeConfig = Callable[..., RunConfig]
SPIKE = "stability.spike={window: 4, sigma: 4, min_rise: 0.5}"
BAD_SAMPLE = 30  # in step 8, since a step takes 4


@pytest.fixture
def seen(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The inputs of every training batch; the bad sample triples the loss of its batch."""
    task = LanguageModelingTask(DataDirectory.open(make_config().data.path), 16, 0)
    bad = next(iter(task.batches(MicroBatches(BAD_SAMPLE, 1, 1)))).inputs[0]
    batches: list[torch.Tensor] = []

    def loss(self: LanguageModelingTask, model: LanguageModel, batch: Batch) -> LossSum:
        batches.append(batch.inputs.clone())
        result = loss_sum(model, batch)
        return result._replace(nats=result.nats * (3 if (batch.inputs == bad).all(-1).any() else 1))

    monkeypatch.setattr(LanguageModelingTask, "loss", loss)
    return batches


def spiked_run(make_config: MakeConfig, out: Path, *overrides: str, resume: bool = False) -> RunResult:
    config = make_config(SPIKE, "checkpoint.every_steps=4", "logging.every_steps=3", "steps=14", *overrides)
    return train(config, out, resume=resume, quiet=True)


def test_first_loss_above_the_limit() -> None:
    config = SpikeConfig(window=3, sigma=2, min_rise=0.1)
    assert find_spike([], [1.0, 9.0, 1.0], config) is None, "too few before"
    assert find_spike([1.0, 1.0, 1.0], [1.05, 1.2, 9.0], config) == (1, pytest.approx(1.0167 + 0.1, abs=1e-3))
    assert find_spike([1.0, 3.0, 2.0], [3.6, 3.0], config) is None
    assert find_spike([1.0, 3.0, 2.0], [3.7], config) == (0, pytest.approx(2 + 2 * (2 / 3) ** 0.5))


def test_run_goes_back_and_past_the_data(
    make_config: MakeConfig, tmp_path: Path, seen: list[torch.Tensor]
) -> None:
    result = spiked_run(make_config, tmp_path / "run")
    state = result.state
    (rollback,) = state.rollbacks
    assert (rollback.step, rollback.from_step, rollback.from_sample, rollback.to_sample) == (8, 4, 16, 32)
    assert state.step == 14
    assert state.tokens == 14 * 64
    assert state.next_sample == 14 * 4 + 16
    (line,) = [line for line in read_metrics(result.out) if "rollbacks" in line]
    assert (line["step"], line["spike_step"], line["skipped_samples"]) == (4, 8, 16)
    task = LanguageModelingTask(DataDirectory.open(make_config().data.path), 16, 0)
    order = task.batches(MicroBatches(0, 4, 4))
    windows = [next(order).inputs for _ in range(18)]
    assert len(seen) == 8 + 10
    assert all(torch.equal(a, b) for a, b in zip(seen, windows, strict=True))
    steps = [line["step"] for line in read_metrics(result.out) if "loss" in line]
    assert steps == [3, 6, 9, 12, 14]


def test_killed_after_the_rollback_ends_the_same(
    make_config: MakeConfig, tmp_path: Path, seen: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = spiked_run(make_config, tmp_path / "whole")
    good = LanguageModelingTask.loss

    def die(self: LanguageModelingTask, model: LanguageModel, batch: Batch) -> LossSum:
        if len(seen) == 9:  # the first step after the rollback is done
            raise KeyError("killed")
        return good(self, model, batch)

    seen.clear()
    monkeypatch.setattr(LanguageModelingTask, "loss", die)
    with pytest.raises(KeyError):
        spiked_run(make_config, tmp_path / "run")
    monkeypatch.setattr(LanguageModelingTask, "loss", good)
    resumed = spiked_run(make_config, tmp_path / "run", resume=True)
    assert len(seen) == 9 + 10, "the spike is not met again"
    one, other = (read_checkpoint(result.checkpoint) for result in (whole, resumed))
    assert one.state.model_dump(exclude={"seconds"}) == other.state.model_dump(exclude={"seconds"})
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name
    lines = [[line["step"] for line in read_metrics(run.out)] for run in (whole, resumed)]
    assert lines[0] == lines[1]


def test_before_the_first_checkpoint_it_begins_anew(
    make_config: MakeConfig, tmp_path: Path, seen: list[torch.Tensor]
) -> None:
    result = spiked_run(make_config, tmp_path / "run", "checkpoint.every_steps=null")
    (rollback,) = result.state.rollbacks
    assert (rollback.step, rollback.from_step, rollback.from_sample, rollback.to_sample) == (8, 0, 0, 32)
    assert result.state.next_sample == 14 * 4 + 32


def test_spike_that_is_only_noted(make_config: MakeConfig, tmp_path: Path, seen: list[torch.Tensor]) -> None:
    result = spiked_run(make_config, tmp_path / "run", "stability.spike.rollback=false")
    assert result.state.rollbacks == ()
    assert result.state.next_sample == 14 * 4
    assert [line["spike_step"] for line in read_metrics(result.out) if "spike_step" in line] == [8]
