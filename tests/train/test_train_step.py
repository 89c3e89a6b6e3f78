"""Single steps: the loss is exact under accumulation, and an update that is not finite is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.loss import Batch, LossSum, loss_sum
from tokenformer.language.task import LanguageModelingTask
from tokenformer.models.registry import build_model
from tokenformer.train.config import RunConfig
from tokenformer.train.device import find_device
from tokenformer.train.metrics import read_metrics
from tokenformer.train.micro_batches import MicroBatches
from tokenformer.train.run import train
from tokenformer.train.step import TrainStep

MakeConfig = Callable[..., RunConfig]


def make_step(config: RunConfig) -> TrainStep:
    stage = config.resolve()[0]
    task = LanguageModelingTask(DataDirectory.open(config.data.path), stage.data.sequence_length, 0)
    assert config.model is not None
    return TrainStep(build_model(config.model), task, stage, torch.device("cpu"))


def test_loss_is_weighted_by_targets(make_config: MakeConfig) -> None:
    """Micro-batches with different numbers of targets: as if the batch had been one."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(256, (4, 16), generator=generator)
    targets = torch.randint(256, (4, 16), generator=generator)
    targets[0, 3:] = -100
    targets[2, :10] = -100
    pieces = [Batch(inputs[i : i + 1], targets[i : i + 1]) for i in range(4)]
    whole = make_step(make_config("optimizer.grad_clip=null"))
    split = make_step(make_config("optimizer.grad_clip=null", "data.micro_batch_size=1"))
    one = whole(iter([Batch(inputs, targets)]), 0)
    many = split(iter(pieces), 0, 4)
    assert one.targets == many.targets == (targets != -100).sum()
    torch.testing.assert_close(one.nats, many.nats)
    torch.testing.assert_close(one.grad_norm, many.grad_norm)
    for a, b in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
    model = build_model(make_config().model)  # type: ignore[arg-type]
    reference = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
    reference.backward()
    torch.testing.assert_close(one.nats / one.targets, reference.detach())
    for a, b in zip(whole.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_to_the_norm(make_config: MakeConfig) -> None:
    step = make_step(make_config("optimizer.grad_clip=0.25"))
    result = step(step.task.batches(MicroBatches(0, 4, 4)), 0)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in step.parameters if p.grad is not None])
    assert result.grad_norm > 0.25
    assert clipped == pytest.approx(0.25, rel=1e-4)


def _broken(steps: set[int]) -> Any:
    """The task's loss, not a number in the calls given (from 0)."""
    calls = iter(range(10**6))

    def loss(self: LanguageModelingTask, model: Any, batch: Batch) -> LossSum:
        result = loss_sum(model, batch)
        return result._replace(nats=result.nats * float("nan")) if next(calls) in steps else result

    return mock.patch.object(LanguageModelingTask, "loss", loss)


def test_step_that_is_not_finite_changes_nothing(make_config: MakeConfig) -> None:
    step = make_step(make_config())
    batches: Iterator[Batch] = step.task.batches(MicroBatches(0, 4, 4))
    with _broken({1, 2}):
        step(batches, 0)
        weights = [p.detach().clone() for p in step.parameters]
        moments = [{k: v.clone() for k, v in step.optimizer.state[p].items()} for p in step.parameters]
        for _ in range(2):
            assert step(batches, 1).finite == 0
        assert all(torch.equal(p, w) for p, w in zip(step.parameters, weights, strict=True))
        for parameter, before in zip(step.parameters, moments, strict=True):
            assert all(torch.equal(step.optimizer.state[parameter][k], v) for k, v in before.items())
        assert step(batches, 1).finite == 1
    assert all(step.optimizer.state[p]["step"] == 2 for p in step.parameters)
    assert not any(torch.equal(p, w) for p, w in zip(step.parameters, weights, strict=True))


def test_skipped_steps_are_counted(make_config: MakeConfig, tmp_path: Path) -> None:
    with _broken({0, 3}):
        result = train(make_config(), tmp_path / "run", quiet=True)
    assert result.state.skipped_steps == 2
    assert read_metrics(result.out)[-2]["skipped_steps"] == 2
    assert all(line.get("loss", 0) is not None for line in read_metrics(result.out))


def test_run_ends_after_several_in_a_row(make_config: MakeConfig, tmp_path: Path) -> None:
    with _broken(set(range(2, 100))), pytest.raises(TokenFormerError) as caught:
        train(make_config("steps=50", "checkpoint.every_steps=2"), tmp_path / "run", quiet=True)
    assert "step 7: loss or gradient was not finite for 5 steps in a row" in str(caught.value)
    assert "optimizer.lr" in str(caught.value)


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta"])
def test_unreachable_devices(name: str) -> None:
    with pytest.raises(TokenFormerError, match="device: "):
        find_device(name)


def test_device_is_found() -> None:
    assert find_device("auto").type in ("cuda", "mps", "cpu")
    assert find_device("cpu") == torch.device("cpu")
