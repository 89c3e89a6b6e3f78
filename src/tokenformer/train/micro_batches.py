"""Which samples each forward pass reads: the one thing that data-parallel ranks do not share. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatches:
    """The forward passes of optimiser steps over ``sequences_per_step`` samples each, as one rank sees them.

    Step s takes the samples from ``start_sample + s * sequences_per_step`` on. Each of the ``ranks`` has a
    contiguous share of them, as even as can be, in passes of at most ``sequences_per_forward``. All ranks make
    the same number of passes, since collectives need that: where the samples do not divide, a rank's last ranges
    are shorter, or empty. Over the passes and ranks of a step every sample comes exactly once.

    Raises:
        ValueError: a size below 1, a negative start, or a rank outside ``ranks``.
    """

    start_sample: int
    sequences_per_step: int
    sequences_per_forward: int
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if min(self.sequences_per_step, self.sequences_per_forward, self.ranks) < 1 or self.start_sample < 0:
            raise ValueError(f"{self}: expected sizes of at least 1, from a sample that is not negative")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"{self}: expected a rank from 0 to {self.ranks - 1}")

    @property
    def per_step(self) -> int:
        """Forward passes of one step, the same on all ranks."""
        largest_share = -(-self.sequences_per_step // self.ranks)
        return -(-largest_share // self.sequences_per_forward)

    def __call__(self, k: int) -> range:
        """Global sample indices of this rank's pass ``k``, counted from ``start_sample``; empty where the rank has
        nothing left in that pass."""
        step, within = divmod(k, self.per_step)
        first = self.start_sample + step * self.sequences_per_step
        share_start = first + self.rank * self.sequences_per_step // self.ranks
        share_stop = first + (self.rank + 1) * self.sequences_per_step // self.ranks
        start = min(share_start + within * self.sequences_per_forward, share_stop)
        return range(start, min(start + self.sequences_per_forward, share_stop))
