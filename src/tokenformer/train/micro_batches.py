"""Which samples each forward pass reads: the one thing that data-parallel ranks do not share. No torch here."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from tokenformer.train.batch_sizes import BatchSizes


@dataclass(frozen=True)
class MicroBatches:
    """The forward passes of optimiser steps over ``sequences_per_step`` samples each, as one rank sees them.

    Steps take their samples one after another from ``start_sample`` on. Each of the ``ranks`` has a
    contiguous share of a step's, as even as can be, in passes of at most ``sequences_per_forward``. All ranks make
    the same number of passes, since collectives need that: where the samples do not divide, a rank's last ranges
    are shorter, or empty. Over the passes and ranks of a step every sample comes exactly once.

    With ``sizes`` (of a stage whose batch grows at first, up to ``sequences_per_step``) the first step here is step
    ``first_step`` of the stage.

    Raises:
        ValueError: a size below 1, a negative start, or a rank outside ``ranks``.
    """

    start_sample: int
    sequences_per_step: int
    sequences_per_forward: int
    rank: int = 0
    ranks: int = 1
    sizes: BatchSizes | None = None
    first_step: int = 0

    def __post_init__(self) -> None:
        if min(self.sequences_per_step, self.sequences_per_forward, self.ranks) < 1 or self.start_sample < 0:
            raise ValueError(f"{self}: expected sizes of at least 1, from a sample that is not negative")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"{self}: expected a rank from 0 to {self.ranks - 1}")

    @property
    def per_step(self) -> int:
        """Forward passes of one step of full size, the same on all ranks."""
        return self._passes(self.sequences_per_step)

    def passes(self, step: int) -> int:
        """Forward passes of step ``step`` (from 0, counted from here), the same on all ranks."""
        return self.per_step if self.sizes is None else self._passes(self.sizes.at(self.first_step + step))

    def __call__(self, k: int) -> range:
        """Global sample indices of this rank's pass ``k``, counted from ``start_sample``; empty where the rank has
        nothing left in that pass."""
        first, sequences, within = self._place(k)
        share_start = first + self.rank * sequences // self.ranks
        share_stop = first + (self.rank + 1) * sequences // self.ranks
        start = min(share_start + within * self.sequences_per_forward, share_stop)
        return range(start, min(start + self.sequences_per_forward, share_stop))

    def _place(self, k: int) -> tuple[int, int, int]:
        """First sample and size of the step that pass ``k`` belongs to, and the number of the pass in it."""
        starts, samples = self._rising
        step = bisect_right(starts, k) - 1
        if step < len(starts) - 1:
            return self.start_sample + samples[step], samples[step + 1] - samples[step], k - starts[step]
        later, within = divmod(k - starts[-1], self.per_step)
        first = self.start_sample + samples[-1] + later * self.sequences_per_step
        return first, self.sequences_per_step, within

    @cached_property
    def _rising(self) -> tuple[list[int], list[int]]:
        """Passes and samples before each step until the batch is full, that step included."""
        rising = 0 if self.sizes is None else max(0, self.sizes.warmup_steps - self.first_step)
        sizes = [self.sizes.at(self.first_step + step) for step in range(rising)] if self.sizes else []
        passes = accumulate((self._passes(size) for size in sizes), initial=0)
        return list(passes), list(accumulate(sizes, initial=0))

    def _passes(self, sequences: int) -> int:
        largest_share = -(-sequences // self.ranks)
        return -(-largest_share // self.sequences_per_forward)
