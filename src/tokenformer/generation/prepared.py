"""Decoders that are ready, kept for the next call: recording a step takes longer than many steps."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.fused import FusedStep, serves
from tokenformer.generation.static import STEPS_AT_ONCE, StaticDecoder, Step
from tokenformer.models.base import LanguageModel

_LENGTH_STEP = 256  # lengths are rounded up, so that calls that differ a little share a decoder


class _Key(NamedTuple):
    batch_size: int
    length: int
    sampling: SamplingConfig
    vocab_size: int
    weights: tuple[object, ...]


_kept: WeakKeyDictionary[LanguageModel, tuple[_Key, StaticDecoder]] = WeakKeyDictionary()


@contextmanager
def prepared_decoder(
    model: LanguageModel, state: Any, length: int, sampling: SamplingConfig, vocab_size: int
) -> Iterator[StaticDecoder | None]:
    """A decoder for continuations of ``state`` up to ``length`` tokens; None for models without a static state.

    After the block it is kept for the model's next call, in place of an earlier one, and taken if the weights are still
    the same. Inside, no other call is given it.
    """
    length = -(-(length + STEPS_AT_ONCE) // _LENGTH_STEP) * _LENGTH_STEP
    unseeded = sampling.model_copy(update={"seed": 0})
    key = _Key(state.batch_size, length, unseeded, vocab_size, _weights(model))
    kept_key, decoder = _kept.pop(model, (None, None))
    if kept_key != key:
        decoder = None  # its memory is free before the next takes its own
        decoder = _prepare(model, state, length, unseeded, vocab_size)
    try:
        yield decoder
    finally:
        if decoder is not None:
            _kept[model] = (key, decoder)


def _prepare(
    model: LanguageModel, state: Any, length: int, sampling: SamplingConfig, vocab_size: int
) -> StaticDecoder | None:
    static = model.static_state(state, length)
    if static is None:
        return None
    device = next(model.parameters()).device
    fused = device.type == "cuda" and serves(model, state.batch_size)
    step = FusedStep(model, static) if fused else _model_step(model)
    return StaticDecoder(static, step, sampling, vocab_size, length=length, device=device)


def _model_step(model: LanguageModel) -> Step:
    reference = weakref.ref(model)  # what is kept for a model must not keep it

    def step(tokens: Tensor, state: Any) -> Tensor:
        found = reference()
        assert found is not None
        logits: Tensor = found(tokens, state=state).logits[:, -1]
        return logits

    return step


def _weights(model: LanguageModel) -> tuple[object, ...]:
    """Changes whenever a weight moves or is written to."""
    return tuple(
        (weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version)
        for weight in chain(model.parameters(), model.buffers())
    )
