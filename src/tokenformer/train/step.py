"""One optimiser step: accumulate, clip, check, update. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenformer.models.base import LanguageModel
from tokenformer.train.config import StageConfig
from tokenformer.train.device import autocast, compute_dtype
from tokenformer.train.optimizer import build_optimizer, set_learning_rate, trained_parameters
from tokenformer.train.schedule import lr_factor
from tokenformer.train.task import Task


class StepResult(NamedTuple):
    """What a step gives, all on the device: ``nats`` and ``targets`` (their number), summed over the global batch, the
    gradient's norm before clipping, and ``finite``: 1.0, or 0.0 where the update was left out."""

    nats: Tensor
    targets: Tensor
    grad_norm: Tensor
    finite: Tensor


class TrainStep:
    """Optimiser steps of one stage.

    The loss of a step is the sum over all targets of the global batch divided by their number, whatever the
    micro-batches. An update with a loss or gradient that is not finite is skipped on the device: weights, moments
    and step counts stay as they are.
    """

    def __init__(self, model: LanguageModel, task: Task, stage: StageConfig, device: torch.device) -> None:
        self.model = model
        self.task = task
        self.stage = stage
        self.device = device
        self.dtype = compute_dtype(stage.precision, device)
        self.optimizer = build_optimizer(model, stage.optimizer)
        self.parameters: list[nn.Parameter] = trained_parameters(self.optimizer)

    def learning_rate(self, stage_step: int) -> float:
        """The rate of update ``stage_step`` (from 0) of the stage, before multipliers."""
        return self.stage.optimizer.lr * lr_factor(self.stage.schedule, stage_step, self.stage.steps)

    def __call__(self, batches: Iterator[Any], stage_step: int) -> StepResult:
        """Take the next micro-batches of ``batches`` and update the model."""
        self.optimizer.zero_grad(set_to_none=True)
        nats, targets = self._accumulate(batches)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, self.stage.data.batch_tokens / targets)
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        finite = (torch.isfinite(grad_norm) & torch.isfinite(nats)).float()
        if self.stage.optimizer.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.stage.optimizer.grad_clip, grad_norm)
        set_learning_rate(self.optimizer, self.learning_rate(stage_step))
        # the protocol between GradScaler and fused optimisers: with found_inf = 1 the update does nothing
        self.optimizer.found_inf = 1 - finite  # type: ignore[attr-defined]
        self.optimizer.step()
        return StepResult(nats, targets, grad_norm, finite)

    def _accumulate(self, batches: Iterator[Any]) -> tuple[Tensor, Tensor]:
        nats = torch.zeros((), device=self.device)
        targets = torch.zeros((), device=self.device)
        for _ in range(self.stage.data.accumulation):
            batch = to_device(next(batches), self.device)
            with autocast(self.dtype, self.device):
                loss = self.task.loss(self.model, batch)
            # divided by the nominal size now, so that sums stay small, and by the true count at the end
            (loss.nats / self.stage.data.batch_tokens).backward()
            nats += loss.nats.detach()
            targets += loss.count
        return nats, targets


def to_device(batch: Any, device: torch.device) -> Any:
    """A NamedTuple of tensors (or None), moved; to CUDA without waiting."""
    if device.type == "cpu":
        return batch
    pin = device.type == "cuda"
    return type(batch)(
        *(None if x is None else (x.pin_memory() if pin else x).to(device, non_blocking=True) for x in batch)
    )
