"""The weights of a model one after another in the order of use, and which of them each kernel asks for ahead.

A kernel of one token waits for the one before, and while it turns that one's result into its own the memory would stand
still. So each kernel asks for weights of later ones to come into the second-level cache: so many bytes as memory can
deliver while it runs, a fixed lead ahead of what is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

_ALIGNMENT = 128  # bytes
_LAUNCH_SECONDS = 2e-6  # a kernel that reads nothing
_BYTES_A_SECOND = 4.2e12
_LONGEST_LEAD = 24_000_000  # bytes; about half of a Hopper GPU's cache


class WeightStore:
    """Memory for matrices, filled from the front.

    Args:
        sizes: elements of each matrix that will be added.
        dtype: of all of them.
        device: where.
    """

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._unit = _ALIGNMENT // dtype.itemsize
        self._used = 0
        self.memory = torch.empty(sum(map(self._rounded, sizes)), dtype=dtype, device=device)

    def add(self, weight: Tensor) -> Tensor:
        """A copy of ``weight`` behind those added before."""
        place = self.memory[self._used : self._used + weight.numel()].view(weight.shape)
        place.copy_(weight)
        self._used += self._rounded(weight.numel())
        return place

    def _rounded(self, size: int) -> int:
        return -(-size // self._unit) * self._unit


def stream_ahead(
    memory: Tensor, used: Sequence[int], pauses: int = 1
) -> tuple[list[Tensor | None], Tensor | None]:
    """What each kernel asks for, and what is to be asked for before the first.

    Args:
        memory: the weights in the order of use, one axis.
        used: bytes of ``memory`` that each kernel reads, in order; 0 for one that reads none.
        pauses: to how many launches without reading each amounts beside its reading.

    Returns:
        A part of ``memory`` for each kernel, or None, and the part before the first.
    """
    unit = _ALIGNMENT // memory.element_size()
    seconds = [pauses * _LAUNCH_SECONDS + size / _BYTES_A_SECOND for size in used]
    share = memory.nbytes / sum(seconds)  # bytes for each second
    behind, now, lead = 0, 0.0, 0.0
    for size, duration in zip(used, seconds, strict=True):
        behind += size
        lead = max(lead, behind - share * now)
        now += duration
    lead = min(lead, _LONGEST_LEAD)
    ends, now = [lead], 0.0
    for duration in seconds:
        now += duration
        ends.append(lead + share * now)
    marks = [min(int(end) // _ALIGNMENT * unit, memory.numel()) for end in ends]
    parts = [memory[first:last] if last > first else None for first, last in pairwise(marks)]
    return parts, memory[: marks[0]] if marks[0] else None
