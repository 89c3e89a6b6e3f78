"""One optimiser step: accumulate, clip, check, update. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenformer.models.base import LanguageModel
from tokenformer.parallel.gradients import average_replicas, local_parts, total_norm
from tokenformer.parallel.shard import synchronize_gradients
from tokenformer.parallel.world import PROCESS, World
from tokenformer.train.config import StageConfig
from tokenformer.train.device import autocast, compute_dtype
from tokenformer.train.loss_scale import LossScale
from tokenformer.train.optimizer import build_optimizer, set_learning_rate, trained_parameters
from tokenformer.train.schedule import lr_factor
from tokenformer.train.state import TrainingState
from tokenformer.train.task import Task


class StepResult(NamedTuple):
    """What a step gives, all on the device: ``nats`` and ``targets`` (their number), summed over the global batch, the
    gradient's norm before clipping, ``finite``: 1.0, or 0.0 where the update was left out, and ``sick``: 1.0 where
    that was not merely float16's loss scale finding its place."""

    nats: Tensor
    targets: Tensor
    grad_norm: Tensor
    finite: Tensor
    sick: Tensor


class TrainStep:
    """Optimiser steps of one stage.

    The loss of a step is the sum over all targets of the global batch divided by their number, whatever the
    micro-batches. An update with a loss or gradient that is not finite is skipped on the device: weights, moments
    and step counts stay as they are. In float16 the loss is scaled; ``state`` brings the scale of a checkpoint.
    ``trained``: names of the parameters to train, by default all that the stage does not freeze.
    """

    def __init__(
        self,
        model: LanguageModel,
        task: Task,
        stage: StageConfig,
        device: torch.device,
        state: TrainingState | None = None,
        world: World = PROCESS,
        trained: Collection[str] | None = None,
    ) -> None:
        self.model = model
        self.task = task
        self.stage = stage
        self.device = device
        self.world = world
        self.dtype = compute_dtype(stage.precision, device)
        self.loss_scale = _loss_scale(self.dtype, device, state or TrainingState())
        self.optimizer = build_optimizer(model, stage.optimizer, trained)
        self.parameters: list[nn.Parameter] = trained_parameters(self.optimizer)

    def learning_rate(self, stage_step: int) -> float:
        """The rate of update ``stage_step`` (from 0) of the stage, before multipliers."""
        return self.stage.optimizer.lr * lr_factor(self.stage.schedule, stage_step, self.stage.steps)

    def __call__(self, batches: Iterator[Any], stage_step: int, accumulation: int = 1) -> StepResult:
        """Take the next ``accumulation`` micro-batches of ``batches`` and update the model."""
        self.optimizer.zero_grad(set_to_none=True)
        nats, targets = self._accumulate(batches, accumulation)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        average_replicas(gradients, self.world)
        local = local_parts(gradients)
        scale = 1 if self.loss_scale is None else self.loss_scale.scale
        torch._foreach_mul_(local, self.stage.data.batch_tokens / targets / scale)
        grad_norm = total_norm(gradients)
        finite = (torch.isfinite(grad_norm) & torch.isfinite(nats)).float()
        if self.stage.optimizer.grad_clip is not None:
            # as torch.nn.utils.clip_grads_with_norm_, which does not take gradients of different meshes
            torch._foreach_mul_(local, (self.stage.optimizer.grad_clip / (grad_norm + 1e-6)).clamp(max=1.0))
        set_learning_rate(self.optimizer, self.learning_rate(stage_step))
        # the protocol between GradScaler and fused optimisers: with found_inf = 1 the update does nothing
        self.optimizer.found_inf = 1 - finite  # type: ignore[union-attr]
        self.optimizer.step()
        sick = 1 - finite
        if self.loss_scale is not None:
            # a scale below 1 has nothing left to give: then it is the gradient itself that is too large
            sick *= (~torch.isfinite(nats) | (self.loss_scale.scale < 1)).float()
            self.loss_scale.update(finite)
        return StepResult(nats, targets, grad_norm, finite, sick)

    def _accumulate(self, batches: Iterator[Any], accumulation: int) -> tuple[Tensor, Tensor]:
        nats = torch.zeros((), device=self.device)
        targets = torch.zeros((), device=self.device)
        for index in range(accumulation):
            synchronize_gradients(self.model, self.world, last=index == accumulation - 1)
            batch = to_device(next(batches), self.device)
            with autocast(self.dtype, self.device):
                loss = self.task.loss(self.model, batch)
            # divided by the nominal size now, so that sums stay small, and by the true count at the end
            scaled = loss.nats / self.stage.data.batch_tokens
            (scaled if self.loss_scale is None else scaled * self.loss_scale.scale).backward()
            nats += loss.nats.detach()
            targets += loss.count
        nats, targets = self.world.sum_over_data(torch.stack((nats, targets))).unbind()
        return nats, targets


def _loss_scale(dtype: torch.dtype, device: torch.device, state: TrainingState) -> LossScale | None:
    if dtype != torch.float16:
        return None
    return LossScale(device, state.loss_scale, state.loss_scale_steps)


def to_device(batch: Any, device: torch.device) -> Any:
    """A NamedTuple of tensors (or None), moved; to CUDA without waiting."""
    if device.type == "cpu":
        return batch
    pin = device.type == "cuda"
    return type(batch)(
        *(None if x is None else (x.pin_memory() if pin else x).to(device, non_blocking=True) for x in batch)
    )
