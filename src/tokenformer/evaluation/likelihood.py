"""Log-likelihoods of continuations: whole batches through the model, logits only where something is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenformer.models.base import LanguageModel

_SCORED_LOGITS = 32 * 1024 * 1024
"""Logits held at a time."""


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
    with torch.inference_mode():
        for batch in _batches(sorted(rows, key=len, reverse=True), batch_tokens, batch_size):
            answered = [(place, number) for place, row in enumerate(batch) for number in rows[row]]
            scored = [(place, requests[number].tokens) for place, number in answered]
            for (_, number), answer in zip(answered, _score(model, batch, scored, device), strict=True):
                answers[number] = answer
            on_done(len(answered))
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
        yield list(rows[start : start + count])
        start += count


def _score(
    model: LanguageModel,
    batch: Sequence[tuple[int, ...]],
    scored: Sequence[tuple[int, Sequence[int]]],
    device: torch.device,
) -> Iterator[Likelihood]:
    """The answer for each (row of ``batch``, tokens that end after it)."""
    longest = len(batch[0])
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch], device=device)  # [b, t]
    hidden = model.hidden(tokens).flatten(0, 1)  # [b t, d]
    lengths = [len(continuation) for _, continuation in scored]
    places = [
        place * longest + len(batch[place]) - length + offset
        for (place, _), length in zip(scored, lengths, strict=True)
        for offset in range(length)
    ]
    targets = torch.tensor([token for _, continuation in scored for token in continuation], device=device)
    nats, greedy = _score_positions(model, hidden[torch.tensor(places, device=device)], targets)
    for sums, hits in zip(nats.split(lengths), greedy.split(lengths), strict=True):
        yield Likelihood(sums.sum().item(), bool(hits.all()))


def _score_positions(model: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (float64) of each target [p] after its hidden state [p, d], and whether it is the likeliest."""
    chunk = max(1, _SCORED_LOGITS // model.config.vocab_size)
    nats, greedy = [], []
    for rows, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = model.head(rows).float()  # [p, v]
        chosen = logits.gather(1, wanted[:, None])[:, 0]
        nats.append((chosen - logits.logsumexp(-1)).double().cpu())
        greedy.append((logits.argmax(-1) == wanted).cpu())
    return torch.cat(nats), torch.cat(greedy)
