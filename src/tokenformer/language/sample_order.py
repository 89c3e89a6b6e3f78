"""Which window is sample i: a pure function of (seed, number of windows, weights, i)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from tokenformer.errors import TokenFormerError

# grain warns on import where JAX is not installed, which it does not need here
_level = logging.root.manager.disable
logging.disable(logging.WARNING)
from grain.experimental import index_shuffle  # noqa: E402

logging.disable(_level)

_LARGEST_32_BIT = 2**32 - 1
_SHUFFLE_ROUNDS = 4


class SampleOrder:
    """An endless sequence of (source, window) over several sources of windows.

    **Which source.** With weights as whole numbers ``p_0 .. p_m`` in lowest terms (decimal fractions count as
    written), of the first i samples the first source has ``i - floor(i (P - p_0) / P)``, P the sum; what is left is
    divided among the others in the same way. So each has its exact share of every P samples from a multiple of P on.

    **Which window.** Sample j of source c lies in its epoch ``e = j // n_c``, n_c its number of windows, which holds
    every window once: grain's ``index_shuffle(j % n_c, n_c - 1, seed=(s_c + e) mod 2^32, rounds=4)``, a keyed
    permutation, with ``s_c`` the first word of numpy's ``SeedSequence([seed, c + 1])``.

    Raises:
        TokenFormerError: the seed is out of range, or a source has more than 2^32 - 1 windows.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if not 0 <= seed <= _LARGEST_32_BIT:
            raise TokenFormerError(f"seed: found {seed}, expected a whole number from 0 to {_LARGEST_32_BIT}")
        for length in lengths:
            if length > _LARGEST_32_BIT:
                raise TokenFormerError(
                    f"{length} windows in one data directory, expected at most {_LARGEST_32_BIT}; use a larger "
                    "sequence_length"
                )
        self._lengths = tuple(lengths)
        self.proportions = whole_proportions(weights)
        self._seeds = tuple(
            int(np.random.SeedSequence([seed, source + 1]).generate_state(1)[0])
            for source in range(len(lengths))
        )

    def __getitem__(self, i: int) -> tuple[int, int]:
        """Source and window of sample ``i``.

        Raises:
            IndexError: ``i`` is negative.
        """
        if i < 0:
            raise IndexError(f"sample {i}; samples count from 0")
        source, j = self._source(i)
        length = self._lengths[source]
        epoch, within = divmod(j, length)
        seed = (self._seeds[source] + epoch) & _LARGEST_32_BIT
        return source, index_shuffle(within, max_index=length - 1, seed=seed, rounds=_SHUFFLE_ROUNDS)

    def _source(self, i: int) -> tuple[int, int]:
        """Source of sample ``i``, and how many samples it had before."""
        left, before, after = sum(self.proportions), i, i + 1
        for source, proportion in enumerate(self.proportions[:-1]):
            rest = left - proportion
            others_before, others_after = before * rest // left, after * rest // left
            if others_before == others_after:
                return source, before - others_before
            left, before, after = rest, others_before, others_after
        return len(self.proportions) - 1, before


def whole_proportions(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole numbers of the same proportions, in lowest terms: (0.5, 0.25) -> (2, 1)."""
    fractions = [Fraction(str(weight)) for weight in weights]
    common = lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * common) for fraction in fractions]
    divisor = gcd(*whole)
    return tuple(number // divisor for number in whole)
