"""A model over the ranks of a mesh, wrapped from outside, and whole again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from tokenformer.models.base import LanguageModel
from tokenformer.models.registry import model_class
from tokenformer.parallel.world import World


def shard_blocks(
    model: LanguageModel, mesh: DeviceMesh, *, compute_dtype: torch.dtype, reshard_after_forward: bool = True
) -> None:
    """FSDP2 over the axes ``replicate`` and ``shard`` of ``mesh``, in place; nothing where both have one rank.

    Each block is a unit. Embedding, final norm and head are another, which stays whole from the first use to the end of
    the backward, so that a loss may use ``model.head.weight`` after ``model.hidden``. The gradients of the parameters,
    which become DTensors, are *sums* over the data axes.

    Args:
        model: the same weights on all ranks, float32, on any device; may be split over ``tensor`` before.
        mesh: of :func:`~tokenformer.parallel.world.joined`.
        compute_dtype: of autocast in the forward. With bfloat16 the blocks' weights are gathered in bfloat16, which
            autocast would turn them into anyway; gradients are summed in float32 in any case.
        reshard_after_forward: whether a block's gathered weights are dropped between forward and backward (ZeRO-3)
            or kept (as ZeRO-2).
    """
    data = mesh["shard"] if mesh["replicate"].size() == 1 else mesh["replicate", "shard"]
    if data.size() == 1:
        return
    # activations keep their dtype: autocast decides, as on one device
    weights = torch.bfloat16 if compute_dtype == torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=weights, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=data, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    outer = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model, mesh=data, reshard_after_forward=False, mp_policy=outer)
    register_fsdp_forward_method(model, "hidden")
    for module in sharded_modules(model):
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def sharded_modules(model: LanguageModel) -> list[FSDPModule]:
    """The units of FSDP in ``model``; none where it is whole, or split by tensor parallelism alone."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def synchronize_gradients(model: LanguageModel, world: World, *, last: bool) -> None:
    """Say whether the next backward is the ``last`` of a step, so that gradients are summed over the ranks no more
    often than memory asks for: where weights are sharded and dropped after use, whole gradients are not kept either."""
    for module in sharded_modules(model)[:1]:  # the model itself; the setting is handed on to the blocks
        if world.sizes.shard == 1:
            module.set_requires_gradient_sync(last)
        else:
            module.set_requires_all_reduce(last)


def drop_gathered(model: LanguageModel) -> None:
    """Back to shards, after forward passes that no backward followed."""
    for module in sharded_modules(model):
        module.reshard()


def whole_model(model: LanguageModel) -> LanguageModel:
    """A plain copy of ``model`` on the CPU, the same on every rank; all ranks must call this."""
    drop_gathered(model)
    with torch.device("meta"):
        copy: LanguageModel = model_class(model.config.architecture)(model.config)
    copy.load_state_dict(whole_tensors(dict(model.named_parameters())), assign=True)
    return copy


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU with each DTensor gathered; all ranks must call this with the same names."""
    with _without_advice():
        return {name: _whole(tensor.detach()) for name, tensor in tensors.items()}


def spread_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A copy of ``tensor`` (whole, the same on every rank; or a DTensor) that lies as ``parameter`` does, float32.

    Raises:
        ValueError: another shape.
    """
    if tensor.shape != parameter.shape:
        raise ValueError(f"found {tuple(tensor.shape)}, expected {tuple(parameter.shape)}")
    wide = tensor.detach().to(dtype=torch.float32)
    if not isinstance(parameter, DTensor):
        whole = wide.full_tensor() if isinstance(wide, DTensor) else wide
        return whole.to(device=parameter.device, copy=True)
    mesh, placements = parameter.device_mesh, parameter.placements
    if isinstance(wide, DTensor):
        return wide.redistribute(mesh, placements).clone()
    on_device = wide.to(mesh.device_type)
    return distribute_tensor(on_device, mesh, placements, src_data_rank=None).clone()


def _whole(tensor: Tensor) -> Tensor:
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.to("cpu", copy=True)


@contextmanager
def _without_advice() -> Iterator[None]:
    """torch remarks that gathering a tensor split twice takes two steps, which is meant."""
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
