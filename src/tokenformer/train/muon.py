"""Muon for hidden matrices with AdamW for the rest, exact for sharded matrices (FSDP2, tensor parallelism).

Muon (Keller Jordan 2024; arXiv 2502.16982) replaces each matrix's momentum by the nearest orthogonal one. That needs
the whole matrix: ``torch.optim.Muon`` on a shard orthogonalises the shard, which is another update.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Replicate, Shard

from tokenformer.parallel.local import local_part
from tokenformer.train.adamw import step_adamw

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7
_MATRICES_AT_ONCE = 16
"""Their updates exist together; with more ranks than this, as many, so that each has one to work on."""


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration (quintic): ``U S V^T`` to about ``U V^T``, singular values within 0.7 and 1.2.

    Args:
        matrix: [n, m]; a zero matrix stays zero.
        steps: iterations, 5 as a rule.

    Returns:
        [n, m], in the dtype of ``matrix``; computed in bfloat16 on CUDA, in that dtype elsewhere.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16() if matrix.device.type == "cuda" else matrix
    wide = matrix.shape[0] <= matrix.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(matrix.dtype)


def lr_ratio(shape: Sequence[int], adjust_lr: str) -> float:
    """What the learning rate of an [n, m] matrix is multiplied by, as in ``torch.optim.Muon``.

    ``original``: sqrt(max(1, n / m)). ``match_rms_adamw``: 0.2 sqrt(max(n, m)), which gives the update the
    root mean square that AdamW's has, so that one learning rate and decay serve both.
    """
    n, m = shape
    return math.sqrt(max(1.0, n / m)) if adjust_lr == "original" else 0.2 * math.sqrt(max(n, m))


class Muon(torch.optim.Optimizer):
    """Muon over the parameter groups with ``algorithm: muon`` (matrices), AdamW over those with ``adamw``.

    Each step of a matrix W with gradient G: ``B += (1 - momentum) (G - B)``; ``W *= 1 - lr decay``;
    ``W -= lr ratio orthogonalize(M)`` with M = B, or G + momentum (B - G) with ``nesterov``. Parameters may be
    DTensors: the matrices are put together for the orthogonalisation, and ranks share that work. The attribute
    ``found_inf`` (1.0 on the device) makes a step leave everything as it is, and ``grad_scale`` is what gradients are
    divided by, as with torch's fused optimisers.

    Args:
        groups: dicts with ``params``, ``algorithm`` and ``weight_decay``.
        lr: learning rate of all groups.
        betas: AdamW's.
        eps: AdamW's.
        momentum: Muon's.
        nesterov: look ahead by one gradient.
        ns_steps: Newton-Schulz iterations.
        adjust_lr: ``original`` or ``match_rms_adamw``, see :func:`lr_ratio`.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        adjust_lr: str,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "algorithm": "adamw"})
        self._betas, self._eps = betas, eps
        self._momentum, self._nesterov = momentum, nesterov
        self._ns_steps, self._adjust_lr = ns_steps, adjust_lr

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` is not used."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if trained and group["algorithm"] == "muon":
                self._step_matrices(trained, group["lr"], group["weight_decay"])
            elif trained:
                step_adamw(
                    trained,
                    self.state,
                    lr=group["lr"],
                    betas=self._betas,
                    eps=self._eps,
                    weight_decay=group["weight_decay"],
                    grad_scale=self.grad_scale,
                    found_inf=self.found_inf,
                )

    def _step_matrices(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        at_once = max(_MATRICES_AT_ONCE, _ranks_of(parameters[0]))
        for start in range(0, len(parameters), at_once):
            self._step_some_matrices(parameters[start : start + at_once], lr, weight_decay)

    def _step_some_matrices(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        updates = [self._momentum_update(parameter) for parameter in parameters]
        finite = 1.0 if self.found_inf is None else 1 - self.found_inf
        for parameter, update in zip(parameters, self._orthogonalized(parameters, updates), strict=True):
            local = local_part(parameter)
            local.mul_(1 - lr * weight_decay * finite)
            local.sub_(update * (finite * lr * lr_ratio(parameter.shape, self._adjust_lr)))

    def _momentum_update(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer, gradient = local_part(state["momentum_buffer"]), local_part(cast(Tensor, parameter.grad))
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        if self.found_inf is not None:
            gradient = torch.where(self.found_inf.bool(), buffer, gradient)  # moves the buffer nowhere
        buffer.lerp_(gradient, 1 - self._momentum)
        return gradient.lerp(buffer, self._momentum) if self._nesterov else buffer

    def _orthogonalized(self, parameters: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """The orthogonalised updates (this rank's part of each), whatever the layout of the parameters."""
        result: list[Tensor | None] = [None] * len(updates)
        rows: defaultdict[dist.ProcessGroup, list[int]] = defaultdict(list)
        for index, (parameter, update) in enumerate(zip(parameters, updates, strict=True)):
            if not isinstance(parameter, DTensor):
                result[index] = orthogonalize(update, self._ns_steps)
            elif (group := _row_group(parameter)) is not None:
                rows[group].append(index)
            else:
                result[index] = _gathered(parameter, update, self._ns_steps)
        for group, indices in rows.items():
            shapes = [parameters[index].shape for index in indices]
            shards = [updates[index] for index in indices]
            for index, part in zip(indices, _shared_out(shards, shapes, group, self._ns_steps), strict=True):
                result[index] = part
        return cast(list[Tensor], result)


def _ranks_of(parameter: Tensor) -> int:
    return parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1


def _row_group(parameter: DTensor) -> dist.ProcessGroup | None:
    """The ranks among which the rows of a matrix are split, where that is its whole layout (replicas aside)."""
    split = [index for index, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    if len(split) != 1 or type(parameter.placements[split[0]]) is not Shard:
        return None
    if cast(Shard, parameter.placements[split[0]]).dim != 0:
        return None
    return parameter.device_mesh.get_group(split[0])


def _gathered(parameter: DTensor, update: Tensor, ns_steps: int) -> Tensor:
    """For any layout: every rank puts the matrix together and orthogonalises it."""
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = DTensor.from_local(
        update, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    whole = orthogonalize(sharded.full_tensor(), ns_steps)
    if all(isinstance(placement, Replicate) for placement in placements):
        return whole
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()


def _shared_out(
    shards: Sequence[Tensor], shapes: Sequence[torch.Size], group: dist.ProcessGroup, ns_steps: int
) -> Iterator[Tensor]:
    """Matrix i goes to rank i modulo their number, which orthogonalises it and hands the shards back."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    for start in range(0, len(shards), world):
        mine, theirs = shards[start : start + world], shapes[start : start + world]
        sent = [shard.numel() for shard in mine] + [0] * (world - len(mine))
        received = _shard_sizes(theirs[rank], world) if rank < len(theirs) else [0] * world
        whole = _exchange(torch.cat([shard.flatten() for shard in mine]), sent, received, group)
        if rank < len(theirs):
            whole = orthogonalize(whole.view(theirs[rank]), ns_steps).flatten()
        back = _exchange(whole, received, sent, group)
        parts = back.split(sent)[: len(mine)]
        yield from (part.view_as(shard) for part, shard in zip(parts, mine, strict=True))


def _shard_sizes(shape: torch.Size, world: int) -> list[int]:
    """Elements of each rank's rows: the split of ``torch.chunk``, which ``Shard(0)`` is."""
    rows = -(-shape[0] // world)
    return [max(0, min(rows, shape[0] - index * rows)) * shape[1] for index in range(world)]


def _exchange(flat: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = flat.new_empty(sum(received))
    dist.all_to_all_single(out, flat.contiguous(), received, sent, group=group)
    return out
