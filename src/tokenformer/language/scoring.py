"""How well a model predicts a split: loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.loss import Batch, loss_sum
from tokenformer.language.windows import IGNORED, DocumentWindows, ScoredWindows, ValidationWindows
from tokenformer.models.base import LanguageModel
from tokenformer.parallel.share import WHOLE, Share
from tokenformer.progress import progress_bar

_COUNTED_AT_ONCE = 2**20
_EVALUATED_TOKENS = 16384


class Evaluation(NamedTuple):
    """Total ``nats`` of ``tokens`` predicted tokens, which stand for ``bytes`` UTF-8 bytes of text.

    The first token of the stream has nothing before it: it is not predicted, and its bytes are not counted.
    The end of a document is a predicted token of 0 bytes.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a float."""
        return _perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Total nats / ln 2 / bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.inf

    def metrics(self) -> dict[str, float]:
        """The three measures by name."""
        return {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 709 else math.inf


def mixture_metrics(evaluations: Sequence[Evaluation], shares: Sequence[float]) -> dict[str, float]:
    """The three measures of text of which each part has its share of the tokens.

    Loss is the mean of the parts' losses weighted by share; bits per byte is that loss in bits a token over the mean
    bytes a token, weighted likewise.
    """
    loss = sum(share * part.loss for share, part in zip(shares, evaluations, strict=True))
    rate = sum(share * part.bytes / part.tokens for share, part in zip(shares, evaluations, strict=True))
    return {
        "loss": loss,
        "perplexity": _perplexity(loss),
        "bits_per_byte": loss / math.log(2) / rate if rate else math.inf,
    }


def score(
    model: LanguageModel,
    data: DataDirectory,
    *,
    sequence_length: int,
    batch_size: int | None = None,
    device: torch.device | str,
    split: str = "validation",
    max_tokens: int | None = None,
    stride: int | None = None,
    per_document: bool = False,
    progress: str | None = None,
    share: Share = WHOLE,
) -> Evaluation:
    """Score every token of ``split`` but the first, or the first ``max_tokens`` of these.

    Args:
        model: evaluated as it is on ``device``, and left in the mode it was in.
        data: made with the model's tokenizer.
        sequence_length: the text is taken in windows of so many tokens, each predicted from those before it in its
            window and one.
        batch_size: windows at a time, which does not change the result; by default about 16,384 tokens.
        device: the model's.
        split: ``train``, ``validation`` or ``test``.
        max_tokens: targets to score; has no meaning with ``per_document``.
        stride: windows overlap (:class:`~tokenformer.language.windows.ValidationWindows`).
        per_document: each document by itself, its first token too and its end not
            (:class:`~tokenformer.language.windows.DocumentWindows`).
        progress: the title of a progress bar.
        share: of several ranks each does its part of the batches, and all get the whole result.

    Raises:
        TokenFormerError: there is no such split, or it holds fewer than two tokens.
    """
    if batch_size is None:
        batch_size = max(1, _EVALUATED_TOKENS // sequence_length)
    store = data.split(split)
    windows: ScoredWindows
    if per_document:
        windows = DocumentWindows(store, sequence_length, data.tokenizer.eos_token_id, stride)
    else:
        windows = ValidationWindows(store, sequence_length, max_tokens, stride)
    nats: list[Tensor] = []  # stay on the device until the end, so that it never waits
    shown = progress_bar(progress, windows.num_targets, "tokens") if progress else nullcontext()
    with _evaluation_mode(model), torch.no_grad(), shown as bar:
        for batch, targets in _batches(windows, batch_size, torch.device(device), share):
            nats.append(loss_sum(model, batch).nats.detach())
            if bar is not None:
                bar.advance(targets * share.ranks)
        total = share.add_up(torch.stack(nats).cpu().double().sum().item())
    scored = (
        data.info.splits[split].utf8_bytes
        if per_document
        else _scored_bytes(data, split, windows.num_targets)
    )
    return Evaluation(total, windows.num_targets, scored)


def _batches(
    windows: ScoredWindows, batch_size: int, device: torch.device, share: Share
) -> Iterator[tuple[Batch, int]]:
    """Every ``share.ranks``-th batch and its number of targets; all ranks get as many, the last ones may have none.

    Columns behind the last target of a batch are left out.
    """
    for first in range(0, len(windows), batch_size * share.ranks):
        start = first + share.rank * batch_size
        chosen = [windows[index] for index in range(start, min(start + batch_size, len(windows)))]
        chosen = chosen or [windows.empty()]
        inputs, targets = (np.stack(part) for part in zip(*chosen, strict=True))
        counted = targets != IGNORED
        used = int(np.flatnonzero(counted.any(0))[-1]) + 1 if counted.any() else 1
        batch = Batch(
            *(torch.from_numpy(part[:, :used]).to(device).contiguous() for part in (inputs, targets))
        )
        yield batch, int(counted.sum())


def _scored_bytes(data: DataDirectory, split: str, targets: int) -> int:
    """UTF-8 bytes of the text behind tokens 1 to ``targets`` of the stream."""
    store, tokenizer = data.split(split), data.tokenizer
    if targets == store.num_tokens - 1:  # all: what was read counts, also where tokens do not give it back
        return data.info.splits[split].utf8_bytes - tokenizer.count_bytes(store.tokens(0, 1))
    stops = range(1, targets + 1, _COUNTED_AT_ONCE)
    return sum(
        tokenizer.count_bytes(store.tokens(start, min(start + _COUNTED_AT_ONCE, targets + 1)))
        for start in stops
    )


@contextmanager
def _evaluation_mode(model: LanguageModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
