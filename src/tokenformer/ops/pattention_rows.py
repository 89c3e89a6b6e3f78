"""The passes over the scores of Pattention on a GPU: which Triton kernel, and how it is laid out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenformer.ops.pattention import NORM_ACTIVATIONS, WeightKind
from tokenformer.ops.pattention_triton import long_backward, long_forward, whole_backward, whole_forward

_LONGEST_WHOLE_ROW = 16384
_MOST_PIECES = 8
_BLOCK = 4096  # of rows that are longer
_STATISTICS = 2


class _Launch(NamedTuple):
    """How whole rows are laid out: rows a program, columns of a piece, pieces of a row, warps."""

    rows: int
    piece: int
    pieces: int
    warps: int


def launch_of(n: int, elements_per_thread: int) -> _Launch | None:
    """None for rows too long to be taken whole."""
    if n > _LONGEST_WHOLE_ROW:
        return None
    sizes = [1 << power for power in range(4, 15) if -(-n // (1 << power)) <= _MOST_PIECES]
    piece = min(sizes, key=lambda size: (-(-n // size) * size, -size))  # least padding, then fewest pieces
    warps = 2
    while warps < 16 and 2 * warps * 32 * elements_per_thread <= n:
        warps *= 2
    rows = 1
    while 2 * rows * n <= 32 * warps * elements_per_thread:
        rows *= 2
    return _Launch(rows, piece, -(-n // piece), warps)


def weights_forward(scores: Tensor, kind: WeightKind, *, keep: bool) -> tuple[Tensor, Tensor]:
    """Weights of all parameter tokens, and what :func:`weights_backward` needs beside the scores.

    Args:
        scores: [rows, n], contiguous; bfloat16 or float32. Overwritten with the weights unless ``keep``.
        kind: the weight function.
        keep: whether the scores are needed afterwards.

    Returns:
        Weights [rows, n] in the dtype of ``scores``; and statistics, [rows, 2] float32.
    """
    weights = torch.empty_like(scores) if keep else scores
    statistics = torch.empty(scores.shape[0], _STATISTICS, dtype=torch.float32, device=scores.device)
    _run(whole_forward, long_forward, 24, (scores, weights, statistics), kind)
    return weights, statistics


def weights_backward(
    scores: Tensor, weight_grads: Tensor, statistics: Tensor, kind: WeightKind, *, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """The weights again, and the gradient of the scores.

    Args:
        scores: [rows, n], as :func:`weights_forward` had them. Overwritten with the weights unless ``keep``.
        weight_grads: [rows, n], contiguous, same dtype; overwritten with the gradient of the scores.
        statistics: [rows, 2], from :func:`weights_forward`.
        kind: the weight function.
        keep: whether the scores are needed afterwards.

    Returns:
        Weights and gradient of the scores, [rows, n] each.
    """
    weights = torch.empty_like(scores) if keep else scores
    _run(whole_backward, long_backward, 16, (scores, weight_grads, weights, statistics), kind)
    return weights, weight_grads


def _run(
    whole: Any,
    long: Any,
    elements_per_thread: int,
    tensors: tuple[Tensor, ...],
    kind: WeightKind,
) -> None:
    rows, n = tensors[0].shape
    if rows == 0:
        return
    numbers = (rows, n, kind.tau**0.5, kind.tau, kind.norm_eps)
    function = {
        "KIND": NORM_ACTIVATIONS.index(kind.norm_activation),
        "TANH": kind.gelu_approximate == "tanh",
        "EXACT": tensors[0].dtype == torch.float32,
    }
    launch = launch_of(n, elements_per_thread)
    if launch is None:
        blocks = -(-n // _BLOCK)
        long[(rows,)](*tensors, *numbers, **function, BLOCK=_BLOCK, BLOCKS=blocks, num_warps=8)
        return
    whole[(-(-rows // launch.rows),)](
        *tensors,
        *numbers,
        **function,
        EVEN=launch.piece * launch.pieces == n,
        ROWS=launch.rows,
        PIECE=launch.piece,
        PIECES=launch.pieces,
        num_warps=launch.warps,
    )
