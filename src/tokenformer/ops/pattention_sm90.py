"""Pattention's products that give scores, or the gradients of weights, with everything a score goes through next: one
CUDA kernel for Hopper GPUs, ``pattention_sm90.cu``, compiled when it is first needed.

What it computes is that of :mod:`tokenformer.ops.pattention_rows` behind a product, which also serves where this does
not.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenformer.ops.pattention import WeightKind
from tokenformer.ops.pattention_sm90_driver import (
    BLOCKS,
    MAP_BYTES,
    SHARED_BYTES,
    check,
    compiled_kernel,
    tensor_map,
)

TILE_ROWS, TILE_TOKENS, TILE_INNER = 128, 192, 64
"""Of a block: its rows, its parameter tokens, and how much of the inner axis is loaded at a time."""
_THREADS = 512
_LEAST_ROWS = 1024
_MOST_PROJECTIONS = 4  # of one launch of the backward
FORWARD_KINDS = ("gelu", "l2_norm_gelu")
"""Whose forward the kernel can do; every kind's backward."""
PAYS = {
    ("gelu", False): 0,
    ("gelu", True): 0,
    ("l2_norm_gelu", False): 0,
    ("l2_norm_gelu", True): 0,
    ("gelu_l2_norm", True): 0,
    ("softmax", True): 0,
}
"""Kinds, and whether in the backward, for which it was measured to be faster than a product and a pass behind it: from
so many parameter tokens on (``benchmarks/pattention_kernel.py``)."""


def serves(a: Tensor, b: Tensor, n: int, kind: WeightKind, *, backward: bool) -> bool:
    """Whether the kernel :func:`takes` the product, and is worth it."""
    return n >= PAYS.get((kind.norm_activation, backward), math.inf) and takes(a, b, n)


def takes(a: Tensor, b: Tensor, n: int) -> bool:
    """Whether the kernel can do the product of ``a`` [rows, inner] and tokens ``b`` [p * n, inner]."""
    return (
        a.device.type == "cuda"
        and _is_available()
        and a.dtype == b.dtype == torch.bfloat16
        and _is_hopper(a.device.index)
        and _clusters(a.device.index, -(-n // TILE_TOKENS)) > 0
        and a.shape[0] >= _LEAST_ROWS
        and n >= TILE_TOKENS // 2
        and n % 8 == 0
        and all(_loads(t) for t in (a, b))
    )


def _loads(matrix: Tensor) -> bool:
    """Whether the copy engine can load it: rows of whole 16 bytes."""
    return (
        matrix.stride(-1) == 1
        and matrix.shape[-1] >= 8
        and matrix.shape[-1] % 8 == 0
        and matrix.stride(0) % 8 == 0
        and matrix.data_ptr() % 16 == 0
    )


@functools.cache
def _is_available() -> bool:
    # in this order: a package is imported to look for what is in it
    names = ("triton", "cuda", "cuda.bindings")
    return all(importlib.util.find_spec(name) is not None for name in names)


@functools.cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def scores_and_weights(
    x: Tensor, key: Tensor, projections: int, kind: WeightKind, *, keep_scores: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Scores, weights and the rows' statistics of ``x`` [rows, d_in] for ``key`` [p * n, d_in]; ``kind`` is one of
    :data:`FORWARD_KINDS`.

    Returns:
        scores [rows * p, n] or None, weights [rows * p, n], statistics [rows * p, 2] (float32, of the scores before
        they are rounded; arbitrary for ``gelu``).
    """
    rows, n = x.shape[0], key.shape[0] // projections
    weights = x.new_empty(rows * projections, n)
    scores = torch.empty_like(weights) if keep_scores else None
    statistics = x.new_empty(rows * projections, 2, dtype=torch.float32)
    _launch([x], key.view(projections, n, -1), scores, weights, None, statistics, 0, kind)
    return scores, weights, statistics


def weights_and_score_grads(
    grads: list[Tensor], value: Tensor, scores: Tensor, statistics: Tensor, kind: WeightKind
) -> tuple[Tensor, Tensor]:
    """The weights again and the gradient of the scores, [rows * p, n] each, from the outputs' gradients ``grads``,
    p times [rows, d_out], and ``value`` [p * n, d_out]."""
    weights, score_grads = (torch.empty_like(scores) for _ in range(2))
    tokens = value.view(len(grads), scores.shape[1], -1)
    for first in range(0, len(grads), _MOST_PROJECTIONS):
        some = slice(first, first + _MOST_PROJECTIONS)
        _launch(grads[some], tokens[some], scores, weights, score_grads, statistics, first, kind)
    return weights, score_grads


class _Arguments(ctypes.Structure):
    """``Arguments`` of the kernel."""

    _fields_ = (
        ("scores", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("statistics", ctypes.c_void_p),
        ("partials", ctypes.c_void_p),
        ("row_stride", ctypes.c_uint64),
        ("statistics_stride", ctypes.c_uint32),
        ("rows", ctypes.c_uint32),
        ("n", ctypes.c_uint32),
        ("inner", ctypes.c_uint32),
        ("projections", ctypes.c_uint32),
        ("root", ctypes.c_float),
        ("tau", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


def _launch(
    inputs: Sequence[Tensor],
    tokens: Tensor,
    scores: Tensor | None,
    weights: Tensor,
    grads: Tensor | None,
    statistics: Tensor,
    first_projection: int,
    kind: WeightKind,
) -> None:
    """``inputs``, one [rows, inner] for each projection, in the forward one for all; ``tokens`` [p, n, inner]; the rest
    as whole tensors, of which the p projections from ``first_projection`` on are read and written."""
    from cuda.bindings import driver

    rows, inner = inputs[0].shape
    projections, n, _ = tokens.shape
    in_all = weights.shape[0] // rows
    panels, tiles = -(-rows // (BLOCKS * TILE_ROWS)), -(-n // TILE_TOKENS)
    needs_row = kind.norm_activation != "gelu"
    parts = projections * tiles * panels * BLOCKS * TILE_ROWS * needs_row
    partials = weights.new_full((parts,), -1, dtype=torch.int64)
    scores_at, weights_at, grads_at = (
        None if matrix is None else matrix.data_ptr() + 2 * n * first_projection
        for matrix in (scores, weights, grads)
    )
    arguments = _Arguments(
        scores_at,
        weights_at,
        grads_at,
        statistics.data_ptr() + 8 * first_projection,
        partials.data_ptr(),
        in_all * n,
        in_all,
        rows,
        n,
        inner,
        projections,
        math.sqrt(kind.tau),
        kind.tau,
        kind.norm_eps,
    )
    box = (TILE_INNER, TILE_ROWS)
    maps = [tensor_map(a.data_ptr(), (inner, rows), (a.stride(0),), box) for a in inputs]
    map_b = tensor_map(
        tokens.data_ptr(),
        (inner, n, projections),
        (tokens.stride(1), tokens.stride(0)),
        (TILE_INNER, TILE_TOKENS // BLOCKS, 1),
    )
    device = weights.device
    clusters = min(_clusters(device.index, tiles if needs_row else 1), panels * tiles * projections)
    with torch.cuda.device(device):
        kernel = compiled_kernel(device.index, grads is not None, kind.norm_activation, kind.gelu_approximate)
        stream = torch.cuda.current_stream().cuda_stream
        maps_a = _side_by_side(maps)
        pointers = (ctypes.c_void_p * 3)(
            ctypes.addressof(maps_a), map_b.getPtr(), ctypes.addressof(arguments)
        )
        check(
            driver.cuLaunchKernel(
                kernel,
                BLOCKS * clusters,
                1,
                1,
                _THREADS,
                1,
                1,
                SHARED_BYTES,
                stream,
                ctypes.addressof(pointers),
                0,
            )
        )


def _side_by_side(maps: Sequence[Any]) -> Any:
    """``TensorMaps`` of the kernel, the last of which may be missing."""
    place = (ctypes.c_byte * (MAP_BYTES * _MOST_PROJECTIONS))()
    for index, map_a in enumerate(maps):
        ctypes.memmove(ctypes.addressof(place) + MAP_BYTES * index, map_a.getPtr(), MAP_BYTES)
    return place


def _clusters(device: int, tiles: int) -> int:
    """How many clusters run at once: such that all tiles of a row, which wait for each other, run in the same round."""
    return _resident(device) // tiles * tiles


@functools.cache
def _resident(device: int) -> int:
    """How many clusters fit on the device at once; the same for all forms of the kernel, one block a multiprocessor.
    None, with a warning, where the kernel cannot be compiled or loaded."""
    try:
        return _count_resident(device)
    except RuntimeError as error:
        warnings.warn(f"Pattention's kernel for Hopper GPUs is not used: {error}", stacklevel=2)
        return 0


def _count_resident(device: int) -> int:
    from cuda.bindings import driver

    cluster = driver.CUlaunchAttribute()
    cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = BLOCKS, 1, 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = BLOCKS, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = _THREADS, 1, 1
    config.sharedMemBytes = SHARED_BYTES
    config.attrs, config.numAttrs = [cluster], 1
    with torch.cuda.device(device):
        torch.empty(1, device="cuda")  # makes the device's context the current one
        (clusters,) = check(
            driver.cuOccupancyMaxActiveClusters(compiled_kernel(device, False, "gelu", "none"), config)
        )
    return int(clusters)
