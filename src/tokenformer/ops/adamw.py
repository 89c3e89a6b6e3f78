"""AdamW (arXiv 1711.05101) of many float32 tensors on a GPU in two launches, at the speed of its memory."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

BLOCK = 2048
WARPS = 8
CHUNK = 8 * BLOCK
_STEPS_BLOCK = 128
_COLUMNS = 8  # of the kernels' table


def applies(*lists: Sequence[Tensor]) -> bool:
    """Whether :func:`adamw_update` serves these tensors: all float32, contiguous and on one GPU that Triton serves."""
    device = lists[0][0].device
    return (
        device.type == "cuda"
        and _serves_device(device)
        and all(
            tensor.dtype == torch.float32 and tensor.device == device and tensor.is_contiguous()
            for tensors in lists
            for tensor in tensors
        )
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
    rows = _rows(parameters, gradients, exp_avgs, exp_avg_sqs, steps)
    aligned = (rows[:, :4] % 16 == 0).all(axis=1) & (rows[:, 5] % 4 == 0)
    device = parameters[0].device
    with torch.cuda.device_of(parameters[0]):
        for wide in (True, False):
            if (chosen := aligned == wide).any():
                _launch(rows[chosen], wide, device, lr, betas, eps, weight_decay, grad_scale, found_inf)
    torch.autograd.graph.increment_version(parameters)


def _rows(parameters: Sequence[Tensor], *others: Sequence[Tensor]) -> np.ndarray:
    """The kernels' table but for the first chunks, [tensors, 8] int64."""
    rows = np.zeros((len(parameters), _COLUMNS), np.int64)
    for column, tensors in enumerate((parameters, *others)):
        rows[:, column] = [tensor.data_ptr() for tensor in tensors]
    rows[:, 5] = [parameter.numel() for parameter in parameters]
    return rows


def _launch(
    rows: np.ndarray,
    aligned: bool,
    device: torch.device,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    from tokenformer.ops.adamw_triton import advance_steps, update_chunks

    table, tensor_of_chunk = _to_device(rows, device)
    factors = torch.empty(len(rows), 2, device=device)
    advance_steps[(-(-len(rows) // _STEPS_BLOCK),)](
        table,
        factors,
        found_inf,
        len(rows),
        float(lr),
        *(math.log(beta) if beta else -math.inf for beta in betas),
        FOUND_INF=found_inf is not None,
        BLOCK=_STEPS_BLOCK,
        num_warps=4,
    )
    if not len(tensor_of_chunk):
        return
    update_chunks[(len(tensor_of_chunk),)](
        table,
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


def _to_device(rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """The whole table [tensors, 8] int64 and the tensor of each chunk [chunks] int32, in one copy.

    It is made anew each time, as gradients may lie elsewhere in each step; the host's memory is the caching
    allocator's, which does not give it out again before the copy is done.
    """
    chunks = -(-rows[:, 5] // CHUNK)
    rows[:, 6] = np.cumsum(chunks) - chunks
    count = int(chunks.sum())
    host = torch.empty(rows.size + -(-count // 2), dtype=torch.int64, pin_memory=device.type == "cuda")
    host[: rows.size].numpy()[:] = rows.ravel()
    host[rows.size :].view(torch.int32)[:count].numpy()[:] = np.repeat(np.arange(len(rows)), chunks)
    whole = host.to(device, non_blocking=True)
    return whole[: rows.size], whole[rows.size :].view(torch.int32)[:count]
