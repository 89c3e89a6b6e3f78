"""Decoders that are ready, kept for the next call: recording a step takes longer than many steps."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from tokenformer.generation import batched, fused
from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.static import STEPS_AT_ONCE, StaticDecoder, Step
from tokenformer.models.base import LanguageModel

_LENGTH_STEP = 256  # lengths are rounded up, so that calls that differ a little share a decoder

StepPath = Literal["fused", "batched", "model"]
"""A kernel for each product; one, and one for the vectors of each; or the model's own operations."""


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
    return StaticDecoder(static, make_step(model, static), sampling, vocab_size, length=length, device=device)


def make_step(model: LanguageModel, static: Any, path: StepPath | None = None) -> Step:
    """The call of one token: by ``path`` where it serves this model and batch on its device, otherwise by the model's
    own operations. Without ``path``, by the first that serves."""
    if next(model.parameters()).device.type == "cuda":
        if path in ("batched", None) and batched.serves(model, static.batch_size):
            return batched.BatchedStep(model, static)
        if path in ("fused", None) and fused.serves(model, static.batch_size):
            return fused.FusedStep(model, static)
    return _model_step(model)


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
