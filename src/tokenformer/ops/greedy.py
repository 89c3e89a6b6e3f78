"""The likeliest token of each row, on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenformer.ops.greedy_triton import largest_of_blocks, largest_of_rows

_BLOCK = 1024


class GreedyChoice:
    """Takes the likeliest tokens, the first of equal ones, into memory that stays where it is.

    Args:
        batch_size: b.
        vocab_size: ids from here on are never taken.
        device: of the logits.
    """

    def __init__(self, batch_size: int, vocab_size: int, device: torch.device) -> None:
        self._blocks = -(-vocab_size // _BLOCK)
        shape = (batch_size, self._blocks)
        self._best = torch.empty(shape, dtype=torch.float32, device=device)
        self._index, self._finite = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
        self._vocab_size = vocab_size

    def __call__(self, logits: Tensor, tokens: Tensor, log: Tensor, count: Tensor) -> None:
        """Into ``tokens`` [b, 1] int64 and row ``count`` [1] of ``log`` [steps, b + 1] int64; the count goes up by one.

        Args:
            logits: [b, v], contiguous; those below ``vocab_size`` that are not finite are not taken.
            tokens: the ids.
            log: the ids, and in the last column whether all of those were finite.
            count: int64.
        """
        batch, v = logits.shape
        parts = (self._best, self._index, self._finite)
        largest_of_blocks[(self._blocks, batch)](logits, *parts, v, self._vocab_size, BLOCK=_BLOCK)
        largest_of_rows[(1,)](
            *parts,
            tokens,
            log,
            count,
            batch,
            self._blocks,
            self._vocab_size,
            ROWS=_power_of_two(batch),
            BLOCKS=_power_of_two(self._blocks),
        )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
