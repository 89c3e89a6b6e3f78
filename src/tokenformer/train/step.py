"""One optimiser step: accumulate, clip, check, update. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenformer.models.base import LanguageModel
from tokenformer.parallel.gradients import average_replicas, total_norm
from tokenformer.parallel.shard import synchronize_gradients
from tokenformer.parallel.world import PROCESS, World
from tokenformer.train.config import StageConfig
from tokenformer.train.cuda_graphs import CudaGraphs
from tokenformer.train.device import autocast, compute_dtype, wants_cuda_graphs
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
        self._graphs: CudaGraphs | None = None
        if world.mesh is None and self.loss_scale is None and wants_cuda_graphs(stage.precision, device):
            self._graphs = CudaGraphs(self.parameters, device)

    @property
    def recorded_memory(self) -> int:
        """Bytes on the device at the peak of recorded passes, which torch's statistics do not see; 0 where there are
        none."""
        return 0 if self._graphs is None else self._graphs.peak_memory

    def learning_rate(self, stage_step: int) -> float:
        """The rate of update ``stage_step`` (from 0) of the stage, before multipliers."""
        return self.stage.optimizer.lr * lr_factor(self.stage.schedule, stage_step, self.stage.steps)

    def __call__(self, batches: Iterator[Any], stage_step: int, accumulation: int = 1) -> StepResult:
        """Take the next ``accumulation`` micro-batches of ``batches`` and update the model."""
        self.optimizer.zero_grad(set_to_none=True)
        nats, targets = self._accumulate(islice(batches, accumulation), accumulation)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        average_replicas(gradients, self.world)
        # gradients are as the backward left them; the optimiser divides them
        factor = self.stage.data.batch_tokens / targets
        if self.loss_scale is not None:
            factor = factor / self.loss_scale.scale
        grad_norm = total_norm(gradients) * factor
        finite = (torch.isfinite(grad_norm) & torch.isfinite(nats)).float()
        if self.stage.optimizer.grad_clip is not None:
            # as torch.nn.utils.clip_grads_with_norm_
            factor = factor * (self.stage.optimizer.grad_clip / (grad_norm + 1e-6)).clamp(max=1.0)
        set_learning_rate(self.optimizer, self.learning_rate(stage_step))
        # the protocol between GradScaler and fused optimisers: with found_inf = 1 the update does nothing
        self.optimizer.found_inf = 1 - finite
        self.optimizer.grad_scale = 1 / factor
        self.optimizer.step()
        sick = 1 - finite
        if self.loss_scale is not None:
            # a scale below 1 has nothing left to give: then it is the gradient itself that is too large
            sick *= (~torch.isfinite(nats) | (self.loss_scale.scale < 1)).float()
            self.loss_scale.update(finite)
        return StepResult(nats, targets, grad_norm, finite, sick)

    def _accumulate(self, batches: Iterator[Any], accumulation: int) -> tuple[Tensor, Tensor]:
        sums = None
        if self._graphs is not None:
            ready = list(batches)
            sums, batches = self._graphs.run(ready, self._run_pass), iter(ready)
        nats, targets = self._run_passes(batches, accumulation) if sums is None else sums
        nats, targets = self.world.sum_over_data(torch.stack((nats, targets))).unbind()
        return nats, targets

    def _run_passes(self, batches: Iterator[Any], accumulation: int) -> tuple[Tensor, Tensor]:
        nats, targets = (torch.zeros((), device=self.device) for _ in range(2))
        for index, batch in enumerate(batches, 1):
            synchronize_gradients(self.model, self.world, last=index == accumulation)
            self._run_pass(to_device(batch, self.device), nats, targets)
        return nats, targets

    def _run_pass(self, batch: Any, nats: Tensor, targets: Tensor) -> None:
        """Forward and backward; adds to both sums, and to the gradients."""
        with autocast(self.dtype, self.device):
            loss = self.task.loss(self.model, batch)
        # divided by the nominal size now, so that sums stay small, and by the true count at the end
        scaled = loss.nats / self.stage.data.batch_tokens
        (scaled if self.loss_scale is None else scaled * self.loss_scale.scale).backward()
        nats += loss.nats.detach()
        targets += loss.count


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
