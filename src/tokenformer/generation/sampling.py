"""From logits to the next token: pure functions, each row by itself. Axis letters: b rows, v vocabulary.

The filters take logits [b, v] float32 and return logits with ``-inf`` for tokens that may not be drawn; at
least one token of every row stays. Nucleus (top-p) sampling is arXiv 1904.09751, min-p is arXiv 2407.01082.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tokenformer.errors import TokenFormerError
from tokenformer.generation.config import SamplingConfig

_NEVER = float("-inf")


def mask_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Exclude the ids from ``vocab_size`` on: rows of the embedding that stand for no token."""
    masked = logits.clone()
    masked[:, vocab_size:] = _NEVER
    return masked


def mask_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the tokens that fewer than ``k`` others exceed: the k likeliest, and ties with the k-th."""
    k = min(k, logits.shape[-1])
    threshold = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, _NEVER)


def mask_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probabilities reach ``p``; of ties, lower ids first."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.softmax(dim=-1).cumsum(dim=-1)
    before = functional.pad(cumulative[:, :-1], (1, 0))  # the share of the likelier tokens
    dropped = before >= p
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), _NEVER)


def mask_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep tokens whose probability is at least ``min_p`` times that of the likeliest one."""
    relative = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    return logits.masked_fill(relative < min_p, _NEVER)


def filter_logits(logits: Tensor, sampling: SamplingConfig, *, vocab_size: int) -> Tensor:
    """Apply padding, temperature, top-k, top-p and min-p, in this order.

    ``logits`` [b, v] of any float dtype -> [b, v] float32, whose softmax is the distribution drawn from.
    """
    logits = mask_padding(logits.float(), vocab_size)
    if sampling.temperature == 0:
        return logits
    # Relative to the row's largest, a tiny temperature cannot end in inf - inf; nor, kept above float32's
    # smallest numbers, in 0 / 0.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    if sampling.top_k is not None:
        logits = mask_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = mask_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = mask_min_p(logits, sampling.min_p)
    return logits


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution of softmax(``logits``): the token into whose share a uniform falls.

    Args:
        logits: [b, v] float32, ``-inf`` for tokens that may not be drawn.
        uniforms: [b] float32 in [0, 1).

    Returns:
        [b] int64 ids; never one of probability zero.
    """
    probabilities = logits.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    drawn = (cumulative <= target).sum(dim=-1)
    # Where rounding lifts the target to the total, the last token that has a share is meant.
    positions = torch.arange(logits.shape[-1], device=logits.device)
    last = positions.where(probabilities > 0, -1).amax(dim=-1)
    return drawn.minimum(last)


def uniforms(seed: int, count: int) -> Tensor:
    """The first numbers of a prompt's random stream, [count] float32 in [0, 1), on the CPU."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def check_finite(finite: bool) -> None:
    """Raise a TokenFormerError unless all logits were finite."""
    if not finite:
        raise TokenFormerError(
            "the model's logits are not finite (NaN or infinity); its weights may be damaged"
        )


class Sampler:
    """Chooses the next token of every row, with one random stream a row (see :class:`SamplingConfig`).

    Args:
        sampling: how to choose.
        batch_size: b, the number of rows.
        vocab_size: ids from here on are padding and never chosen.
    """

    def __init__(self, sampling: SamplingConfig, *, batch_size: int, vocab_size: int) -> None:
        self._sampling = sampling
        self._vocab_size = vocab_size
        # On the CPU whatever the model's device is: the same draws everywhere.
        self._generators = [torch.Generator().manual_seed(sampling.seed + row) for row in range(batch_size)]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        """Ids for ``logits`` [b, v], whose rows are the prompts ``rows``.

        Raises:
            TokenFormerError: logits that are NaN or infinite.
        """
        check_finite(bool(torch.isfinite(logits).all()))
        logits = filter_logits(logits, self._sampling, vocab_size=self._vocab_size)
        if self._sampling.temperature == 0:
            return [int(token) for token in logits.argmax(dim=-1).tolist()]
        uniforms = torch.stack([torch.rand((), generator=self._generators[row]) for row in rows])
        return [int(token) for token in draw(logits, uniforms.to(logits.device)).tolist()]
