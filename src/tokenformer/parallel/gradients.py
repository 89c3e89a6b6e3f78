"""Gradients that lie on several ranks: their norm, and the replicas that must not drift apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tokenformer.parallel.local import local_part, local_parts
from tokenformer.parallel.world import World


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients, float32, the same on every rank: each element counts once, wherever it lies.

    Args:
        gradients: plain tensors (whole on this rank) and DTensors, of any meshes; the same ones on all ranks.
    """
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    parts: defaultdict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        parts[_sharding_groups(gradient)].append(local_part(gradient))
    squares = torch.zeros((), device=gradients[0].device)
    for groups, local in parts.items():
        share = torch.nn.utils.get_total_norm(local).square()
        for group in groups:
            dist.all_reduce(share, group=group)
        squares += share
    return squares.sqrt()


def average_replicas(gradients: Sequence[Tensor], world: World) -> None:
    """Make the gradients that every rank along ``tensor`` computes by itself equal to the last bit, in place.

    They are equal already wherever kernels repeat their sums in the same order; where they do not, the weights would
    drift apart step by step.
    """
    if world.mesh is None or world.sizes.tensor == 1:
        return
    tensor_ranks = world.mesh["tensor"].get_group()
    shared = local_parts([g for g in gradients if tensor_ranks not in _sharding_groups(g)])
    if not shared:
        return
    flat = torch.cat([gradient.flatten() for gradient in shared])
    dist.all_reduce(flat, group=tensor_ranks)
    flat /= world.sizes.tensor
    for gradient, mean in zip(shared, flat.split([g.numel() for g in shared]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _sharding_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups of ranks over which a tensor is split."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    )
