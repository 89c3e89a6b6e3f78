"""float16 with dynamic loss scaling: torch's own rules, exact resume, and overflow that is no sickness."""

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
from tokenformer.models.base import LanguageModel
from tokenformer.models.registry import build_model
from tokenformer.train import loss_scale
from tokenformer.train.checkpoint.contents import read_checkpoint
from tokenformer.train.config import RunConfig
from tokenformer.train.loss_scale import LossScale
from tokenformer.train.metrics import read_metrics
from tokenformer.train.micro_batches import MicroBatches
from tokenformer.train.run import train
from tokenformer.train.step import StepResult, TrainStep

MakeConfig = Callable[..., RunConfig]


def test_scale_moves_as_in_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    ours = LossScale(torch.device("cpu"))
    reference = torch.amp.GradScaler("cpu", growth_interval=3)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    pattern = torch.rand(60, generator=torch.Generator().manual_seed(0)) > 0.25
    for finite in pattern.tolist():
        optimizer.zero_grad()
        reference.scale(parameter * (1.0 if finite else float("inf"))).sum().backward()
        reference.step(optimizer)
        reference.update()
        ours.update(torch.tensor(float(finite)))
        assert ours.scale.item() == reference.get_scale()
    assert len(set(pattern.tolist())) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_are_those_of_float32(make_config: MakeConfig, dtype: str) -> None:
    gradients = {}
    for name in ("float32", dtype):
        config = make_config(f"precision.dtype={name}", "optimizer.grad_clip=null")
        stage = config.resolve()[0]
        assert config.model is not None
        model = build_model(config.model)
        task = LanguageModelingTask(DataDirectory.open(config.data.path), 16, 0)
        step = TrainStep(model, task, stage, torch.device("cpu"))
        step(task.batches(MicroBatches(0, 4, 4)), 0)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in step.parameters if p.grad is not None)
        gradients[name] = torch.cat([p.grad.flatten() for p in step.parameters if p.grad is not None])
    error = (gradients[dtype] - gradients["float32"]).norm() / gradients["float32"].norm()
    assert 0 < error < (0.03 if dtype == "bfloat16" else 0.004)


def test_scaled_run_resumes_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 4)
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 256.0)
    config = make_config("precision.dtype=float16", "checkpoint.every_steps=3", "steps=10")
    whole = train(config, tmp_path / "whole", quiet=True)
    assert whole.metrics["loss_scale"] == 1024.0
    take_step = TrainStep.__call__

    def die(self: TrainStep, batches: Iterator[Any], stage_step: int, *rest: int) -> StepResult:
        if stage_step == 5:
            raise KeyError("killed")
        return take_step(self, batches, stage_step, *rest)

    with mock.patch.object(TrainStep, "__call__", die), pytest.raises(KeyError):
        train(config, tmp_path / "run", quiet=True)
    resumed = train(config, tmp_path / "run", resume=True, quiet=True)
    one, other = read_checkpoint(whole.checkpoint), read_checkpoint(resumed.checkpoint)
    assert one.state.model_dump(exclude={"seconds"}) == other.state.model_dump(exclude={"seconds"})
    assert one.state.loss_scale_steps == 2
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name
        assert torch.equal(one.moments[name]["exp_avg"], other.moments[name]["exp_avg"]), name


def test_overflow_until_the_scale_fits_is_not_sick(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**60)
    result = train(make_config("precision.dtype=float16", "steps=60"), tmp_path / "run", quiet=True)
    skipped = result.state.skipped_steps
    assert 5 < skipped < 60
    assert result.metrics["loss_scale"] == 2.0 ** (60 - skipped)
    losses = [line["loss"] for line in read_metrics(result.out) if line.get("loss") is not None]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sick_steps_end_the_run_as_configured(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    def infinite(self: LanguageModelingTask, model: LanguageModel, batch: Batch) -> LossSum:
        loss = loss_sum(model, batch)
        return loss._replace(nats=loss.nats * torch.inf)

    config = make_config("stability.max_nonfinite_steps=2", "steps=50", f"precision.dtype={dtype}")
    monkeypatch.setattr(LanguageModelingTask, "loss", infinite)
    with pytest.raises(TokenFormerError, match="step 2: loss or gradient was not finite for 2 steps"):
        train(config, tmp_path / "run", quiet=True)


def test_float8_where_there_is_none(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(
        TokenFormerError, match=r"precision\.float8: cpu has no float8, expected a CUDA device"
    ):
        train(make_config("precision.float8=true", "parallel.device=cpu"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
