"""How tokens and a model meet: prompts go in whole, then one token a step, by plain calls or in static memory.

Axis letters: b prompts, t time, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.prepared import prepared_decoder
from tokenformer.generation.sampling import Sampler
from tokenformer.generation.static import LaggingReader
from tokenformer.models.base import LanguageModel

_TEXT, _PADDING = 0, -1  # document ids
_FEWEST_STATIC_STEPS = 16  # for fewer, recording a step costs more than it saves


class TokenFeed(Protocol):
    """Chooses the next tokens of the prompts, and feeds them to the model."""

    def choose(self, rows: Sequence[int]) -> list[int]:
        """The next token of each of the prompts ``rows``, those that have not ended."""

    def append(self, tokens: list[int | None]) -> None:
        """What became of them: None for a prompt that has ended."""


@contextmanager
def token_feed(
    model: LanguageModel, prompts: list[list[int]], steps: int, sampling: SamplingConfig, vocab_size: int
) -> Iterator[TokenFeed]:
    """In static memory where that pays: on a GPU, for models that have a static state."""
    prefill = Prefill(model, prompts)
    if _static_pays(prefill.device, steps):
        with static_feed(model, prefill, steps, sampling, vocab_size) as feed:
            if feed is not None:
                yield feed
                return
    yield PlainFeed(model, prefill, sampling, vocab_size)


def _static_pays(device: torch.device, steps: int) -> bool:
    return device.type == "cuda" and steps >= _FEWEST_STATIC_STEPS


class Prefill:
    """The prompts, padded on the left, and the model's logits and state after them."""

    def __init__(self, model: LanguageModel, prompts: list[list[int]]) -> None:
        self.device = next(model.parameters()).device
        self.batch_size = len(prompts)
        self.length = max(map(len, prompts), default=0)
        padding = [self.length - len(prompt) for prompt in prompts]
        # Equal lengths need no document ids, which leaves models their faster path.
        self.is_ragged = any(padding)
        tokens = _tensor(
            [[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)], self.device
        )
        documents = _tensor(
            [[_PADDING] * pad + [_TEXT] * (self.length - pad) for pad in padding], self.device
        )
        self.logits, self.state = _call(
            model, tokens, documents if self.is_ragged else None, model.initial_state(self.batch_size)
        )


class PlainFeed:
    """By plain calls of the model, each from the state that the one before returned."""

    def __init__(
        self, model: LanguageModel, prefill: Prefill, sampling: SamplingConfig, vocab_size: int
    ) -> None:
        self._model = model
        self._prefill = prefill
        self._logits: Tensor | None = prefill.logits
        self._state = prefill.state
        self._sampler = Sampler(sampling, batch_size=prefill.batch_size, vocab_size=vocab_size)
        self._next: list[int | None] = []

    def choose(self, rows: Sequence[int]) -> list[int]:
        if self._logits is None:
            tokens = _tensor([[0 if token is None else token] for token in self._next], self._prefill.device)
            documents = None
            if self._prefill.is_ragged:
                ids = [[_PADDING if token is None else _TEXT] for token in self._next]
                documents = _tensor(ids, self._prefill.device)
            self._logits, self._state = _call(self._model, tokens, documents, self._state)
        logits, self._logits = self._logits, None
        return self._sampler(logits[list(rows)], rows)

    def append(self, tokens: list[int | None]) -> None:
        self._next = tokens  # a prompt that has ended gets a filler


class StaticFeed:
    """In static memory, ahead of what is asked for."""

    def __init__(self, reader: LaggingReader) -> None:
        self._reader = reader
        self._step = 0

    def choose(self, rows: Sequence[int]) -> list[int]:
        with torch.inference_mode():
            tokens = self._reader.tokens(self._step, rows)
        self._step += 1
        return tokens

    def append(self, tokens: list[int | None]) -> None:
        """Nothing: the device has gone on by itself."""


@contextmanager
def static_feed(
    model: LanguageModel, prefill: Prefill, steps: int, sampling: SamplingConfig, vocab_size: int
) -> Iterator[StaticFeed | None]:
    """None for models without a static state."""
    length = prefill.length + steps
    with ExitStack() as stack:
        with torch.inference_mode():
            preparing = prepared_decoder(model, prefill.state, length, sampling, vocab_size)
            decoder = stack.enter_context(preparing)
            if decoder is not None:
                decoder.start(prefill.state, prefill.logits, sampling.seed)
        yield None if decoder is None else StaticFeed(LaggingReader(decoder, steps))


def _call(model: LanguageModel, tokens: Tensor, documents: Tensor | None, state: Any) -> tuple[Tensor, Any]:
    """Logits [b, v] after the last of ``tokens`` [b, t], and the next state."""
    with torch.inference_mode():
        output = model(tokens, documents=documents, state=state, logits_to_keep=1)
    logits: Tensor = output.logits[:, -1]
    return logits, output.state


def _tensor(values: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
