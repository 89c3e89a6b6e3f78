"""AdamW (arXiv 1711.05101) of many float32 tensors on a GPU in two launches, at the speed of its memory."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import cache
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024  # elements at a time
WARPS = 4
CHUNK = 4 * BLOCK  # of one program
_STEPS_BLOCK = 128
_COLUMNS, _SIZE, _FIRST = 8, 5, 6  # of the kernels' table, see adamw_triton


def applies(parameters: Sequence[Tensor], *likewise: Sequence[Tensor], steps: Sequence[Tensor]) -> bool:
    """Whether :func:`adamw_update` serves these tensors: all float32, contiguous, of the parameters' shapes, and on one
    GPU that Triton serves."""
    device = parameters[0].device
    if device.type != "cuda" or not _serves_device(device):
        return False
    shapes = [parameter.shape for parameter in parameters]
    return all(
        tensor.dtype == torch.float32
        and tensor.device == device
        and tensor.shape == shape
        and tensor.is_contiguous()
        for tensors, of in (
            (parameters, shapes),
            *((x, shapes) for x in likewise),
            (steps, repeat(torch.Size())),
        )
        for tensor, shape in zip(tensors, of, strict=False)
    )


@cache
def _serves_device(device: torch.device) -> bool:
    return (
        importlib.util.find_spec("triton") is not None
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def adamw_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of all ``parameters``, their moments and ``steps``, in place, for what :func:`applies` admits.

    The host does not wait for the device.

    Args:
        parameters: of any shapes.
        gradients: like the parameters; they stay as they are.
        exp_avgs: first moments, like the parameters.
        exp_avg_sqs: second moments, like the parameters.
        steps: [] each; 1 is added.
        lr: learning rate.
        betas: decay of both moments.
        eps: added to the root of the second.
        weight_decay: decoupled, times ``lr``.
        grad_scale: [] float32, what gradients are divided by.
        found_inf: [] float32, 1.0 leaves everything as it is.
    """
    from tokenformer.ops.adamw_triton import advance_steps, update_chunks

    with torch.cuda.device_of(parameters[0]):
        work = _work(parameters, gradients, exp_avgs, exp_avg_sqs, steps)
        factors = torch.empty(len(steps), 2, device=parameters[0].device)
        advance_steps[(-(-len(steps) // _STEPS_BLOCK),)](
            work.table,
            factors,
            found_inf,
            len(steps),
            float(lr),
            *(math.log(beta) if beta else -math.inf for beta in betas),
            FOUND_INF=found_inf is not None,
            BLOCK=_STEPS_BLOCK,
            num_warps=4,
        )
        for tensor_of_chunk, aligned in ((work.aligned, True), (work.others, False)):
            if not len(tensor_of_chunk):
                continue
            update_chunks[(len(tensor_of_chunk),)](
                work.table,
                tensor_of_chunk,
                factors,
                grad_scale,
                found_inf,
                float(lr * weight_decay),
                1.0 - betas[0],
                1.0 - betas[1],
                float(eps),
                GRAD_SCALE=grad_scale is not None,
                FOUND_INF=found_inf is not None,
                ALIGNED=aligned,
                CHUNK=CHUNK,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    torch.autograd.graph.increment_version(parameters)  # kernels go past torch


class _Work(NamedTuple):
    """What the kernels are given, on the device: ``table`` [tensors, 8] int64, and the tensor of each chunk, [chunks]
    int32, apart for those that lie at multiples of 16 bytes, and fill them, and for the others."""

    table: Tensor
    aligned: Tensor
    others: Tensor


def _work(parameters: Sequence[Tensor], *others: Sequence[Tensor]) -> _Work:
    """Made anew in each step, as gradients may lie elsewhere in each, and sent in one copy. The host's memory is the
    caching allocator's, which does not give it out again before the copy is done."""
    tensors, device = len(parameters), parameters[0].device
    table = np.zeros((tensors, _COLUMNS), np.int64)
    for column, parts in enumerate((parameters, *others)):
        table[:, column] = [part.data_ptr() for part in parts]
    table[:, _SIZE] = [parameter.numel() for parameter in parameters]
    aligned = (table[:, :4] % 16 == 0).all(axis=1) & (table[:, _SIZE] % 4 == 0)
    chunks = -(-table[:, _SIZE] // CHUNK)
    tensor_of_chunk = []
    for chosen in (aligned, ~aligned):
        table[chosen, _FIRST] = np.cumsum(chunks[chosen]) - chunks[chosen]
        tensor_of_chunk.append(np.repeat(np.flatnonzero(chosen), chunks[chosen]))
    wide, narrow = map(len, tensor_of_chunk)
    host = torch.empty(2 * table.size + wide + narrow, dtype=torch.int32, pin_memory=device.type == "cuda")
    parts = host.split([2 * table.size, wide, narrow])
    parts[0].numpy().view(np.int64)[:] = table.ravel()
    for part, values in zip(parts[1:], tensor_of_chunk, strict=True):
        part.numpy()[:] = values
    whole = host.to(device, non_blocking=True).split([2 * table.size, wide, narrow])
    return _Work(whole[0].view(torch.int64), whole[1], whole[2])
