"""Log-likelihoods of continuations: whole batches through the model, logits only where something is scored."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenformer.models.base import LanguageModel

_SCORED_LOGITS = 32 * 1024 * 1024
"""Logits held at a time."""

_ROUND_ROWS = 16
"""Large batches have a multiple of so many rows: numbers for which kernels need not be compiled anew."""

_BATCHES_AHEAD = 2
"""Batches that a GPU may have before it while the answers of an earlier one are awaited."""


class Continuation(NamedTuple):
    """Token ids to score, and those before them (at least one)."""

    context: Sequence[int]
    tokens: Sequence[int]


class Likelihood(NamedTuple):
    """``nats``: the summed log-probability of a continuation; ``greedy``: whether each of its tokens is the
    likeliest one at its place."""

    nats: float
    greedy: bool


def log_likelihoods(
    model: LanguageModel,
    requests: Sequence[Continuation],
    *,
    max_length: int,
    batch_tokens: int,
    batch_size: int | None = None,
    on_done: Callable[[int], None] = lambda requests: None,
) -> list[Likelihood]:
    """Score every request, in their order.

    Rows are padded on the right, where a causal model cannot see, and sorted by length, so that neither the batch
    size nor the company of a request changes more of its score than rounding. Requests with the same input (the
    one-token answers to one question, say) share one row.

    Args:
        model: on its own device, in evaluation mode.
        requests: contexts of at least one token, continuations of 1 to ``max_length``.
        max_length: tokens the model sees; of a longer context the last ones count.
        batch_tokens: tokens in one batch, padding included.
        batch_size: rows in one batch, where that is to be fixed.
        on_done: told after each batch how many requests it answered.

    Raises:
        ValueError: an empty context or continuation, or a continuation longer than ``max_length``.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        rows.setdefault(_row(request, max_length), []).append(number)
    answers: list[Likelihood | None] = [None] * len(requests)
    device = next(model.parameters()).device
    running: deque[_Running] = deque()

    def take_oldest() -> None:
        numbers, found = running.popleft()
        for number, answer in zip(numbers, found.fetch(), strict=True):
            answers[number] = answer
        on_done(len(numbers))

    with torch.inference_mode():
        for batch in _batches(sorted(rows, key=len, reverse=True), batch_tokens, batch_size):
            answered = [(place, number) for place, row in enumerate(batch) for number in rows[row]]
            scored = [(place, requests[number].tokens) for place, number in answered]
            running.append(([number for _, number in answered], _score(model, batch, scored, device)))
            if len(running) > _BATCHES_AHEAD:
                take_oldest()
        while running:
            take_oldest()
    return [answer for answer in answers if answer is not None]


def _row(request: Continuation, max_length: int) -> tuple[int, ...]:
    """What the model sees: context and continuation but its last token, the last ``max_length`` of them."""
    if not request.context or not 1 <= len(request.tokens) <= max_length:
        raise ValueError(
            f"request: found {len(request.context)} tokens of context and {len(request.tokens)} to score, "
            f"expected at least 1 and 1 to {max_length}"
        )
    return tuple([*request.context, *request.tokens][-max_length - 1 : -1])


def _batches(
    rows: Sequence[tuple[int, ...]], batch_tokens: int, batch_size: int | None
) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive rows, the longest first: what fits into memory at first fits to the end."""
    start = 0
    while start < len(rows):
        count = batch_size or max(1, batch_tokens // len(rows[start]))
        if count > _ROUND_ROWS and batch_size is None:
            count -= count % _ROUND_ROWS
        yield list(rows[start : start + count])
        start += count


class _Scored(NamedTuple):
    """Log-probability (float64) and whether it is the likeliest, of every scored token of a batch, [p] each, where they
    were computed; and how many tokens each answer has."""

    nats: Tensor
    greedy: Tensor
    lengths: list[int]

    def fetch(self) -> list[Likelihood]:
        """The answers, once they are there."""
        nats, greedy = self.nats.cpu().split(self.lengths), self.greedy.cpu().split(self.lengths)
        return [
            Likelihood(sums.sum().item(), bool(hits.all())) for sums, hits in zip(nats, greedy, strict=True)
        ]


_Running = tuple[list[int], _Scored]


def _score(
    model: LanguageModel,
    batch: Sequence[tuple[int, ...]],
    scored: Sequence[tuple[int, Sequence[int]]],
    device: torch.device,
) -> _Scored:
    """The answer for each (row of ``batch``, tokens that end after it); nothing here waits for a GPU."""
    longest = len(batch[0])
    rows = np.zeros((len(batch), longest), dtype=np.int64)
    for place, row in enumerate(batch):
        rows[place, : len(row)] = row
    lengths = [len(continuation) for _, continuation in scored]
    places = np.concatenate(
        [
            np.arange(len(batch[place]) - length, len(batch[place])) + place * longest
            for (place, _), length in zip(scored, lengths, strict=True)
        ]
    )
    targets = np.concatenate([np.asarray(continuation, dtype=np.int64) for _, continuation in scored])
    hidden = model.hidden(_on(device, rows)).flatten(0, 1)  # [b, t] -> [b t, d]
    nats, greedy = _score_positions(model, hidden[_on(device, places)], _on(device, targets))
    return _Scored(nats, greedy, lengths)


def _on(device: torch.device, numbers: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _score_positions(model: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target [p] after its hidden state [p, d], and whether it is the likeliest."""
    chunk = max(1, _SCORED_LOGITS // model.config.vocab_size)
    nats, greedy = [], []
    for rows, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = model.head(rows).float()  # [p, v]
        chosen = logits.gather(1, wanted[:, None])[:, 0]
        nats.append((chosen - logits.logsumexp(-1)).double())
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(nats), torch.cat(greedy)
