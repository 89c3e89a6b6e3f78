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


Ids = Sequence[int] | np.ndarray


class Continuation(NamedTuple):
    """Token ids to score, and those before them (at least one); lists or integer arrays."""

    context: Ids
    tokens: Ids


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
    rows: dict[bytes, _Row] = {}
    for number, request in enumerate(requests):
        tokens = _input(request, max_length)
        rows.setdefault(tokens.tobytes(), _Row(tokens, [])).requests.append(number)
    answers: list[Likelihood | None] = [None] * len(requests)
    device = next(model.parameters()).device
    running: deque[_Scored] = deque()

    def take_oldest() -> None:
        found = running.popleft()
        for number, answer in zip(found.requests, found.fetch(), strict=True):
            answers[number] = answer
        on_done(len(found.requests))

    by_length = sorted(rows.values(), key=lambda row: len(row.tokens), reverse=True)
    with torch.inference_mode():
        for batch in _batches(by_length, batch_tokens, batch_size):
            running.append(_score(model, batch, requests, device))
            if len(running) > _BATCHES_AHEAD:
                take_oldest()
        while running:
            take_oldest()
    return [answer for answer in answers if answer is not None]


class _Row(NamedTuple):
    """An input of the model [t] int64, and the numbers of the requests that end with it."""

    tokens: np.ndarray
    requests: list[int]


def _input(request: Continuation, max_length: int) -> np.ndarray:
    """What the model sees: context and continuation but its last token, the last ``max_length`` of them."""
    if not len(request.context) or not 1 <= len(request.tokens) <= max_length:
        raise ValueError(
            f"request: found {len(request.context)} tokens of context and {len(request.tokens)} to score, "
            f"expected at least 1 and 1 to {max_length}"
        )
    return np.concatenate((request.context, request.tokens))[-max_length - 1 : -1].astype(
        np.int64, copy=False
    )


def _batches(rows: Sequence[_Row], batch_tokens: int, batch_size: int | None) -> Iterator[Sequence[_Row]]:
    """Consecutive rows, the longest first: what fits into memory at first fits to the end."""
    start = 0
    while start < len(rows):
        count = batch_size or max(1, batch_tokens // len(rows[start].tokens))
        if count > _ROUND_ROWS and batch_size is None:
            count -= count % _ROUND_ROWS
        yield rows[start : start + count]
        start += count


class _Scored(NamedTuple):
    """Log-probability (float64) and whether it is the likeliest, of every scored token of a batch, [p] each, where they
    were computed; of which requests, and where the tokens of each begin."""

    nats: Tensor
    greedy: Tensor
    requests: list[int]
    starts: np.ndarray

    def fetch(self) -> list[Likelihood]:
        """The answers, once they are there."""
        nats = np.add.reduceat(self.nats.cpu().numpy(), self.starts).tolist()
        greedy = np.logical_and.reduceat(self.greedy.cpu().numpy(), self.starts).tolist()
        return list(map(Likelihood, nats, greedy))


def _score(
    model: LanguageModel, batch: Sequence[_Row], requests: Sequence[Continuation], device: torch.device
) -> _Scored:
    """What the requests of ``batch`` get; nothing here waits for a GPU."""
    longest = len(batch[0].tokens)
    rows = np.zeros((len(batch), longest), dtype=np.int64)
    numbers, places, targets = [], [], []
    for place, row in enumerate(batch):
        end = len(row.tokens)
        rows[place, :end] = row.tokens
        for number in row.requests:
            wanted = np.asarray(requests[number].tokens, dtype=np.int64)
            numbers.append(number)
            places.append(np.arange(end - len(wanted), end) + place * longest)
            targets.append(wanted)
    starts = np.cumsum([0, *map(len, targets[:-1])])
    hidden = model.hidden(_on(device, rows)).flatten(0, 1)  # [b, t] -> [b t, d]
    scored = hidden[_on(device, np.concatenate(places))]
    nats, greedy = _score_positions(model, scored, _on(device, np.concatenate(targets)))
    return _Scored(nats, greedy, numbers, starts)


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
