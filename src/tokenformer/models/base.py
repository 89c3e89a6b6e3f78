"""The protocol that training, evaluation and generation rely on; nothing in it assumes attention or text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

from tokenformer.models.config import DecoderConfig


class ModelOutput(NamedTuple):
    """What a model returns.

    ``logits``: [b, t, v] (or the last ``logits_to_keep`` positions). ``state``: what the next call continues
    from, or None when none was given.
    """

    logits: Tensor
    state: Any | None


class LanguageModel(nn.Module, ABC):
    """A model over token ids. ``blocks`` are its repeated layers: the units to compile, checkpoint and shard.

    ``tokens`` [b, t] int64; ``positions`` [b, t] int64, by default counted from the start of each document;
    ``documents`` [b, t] int64: information stays inside a document, -1 is padding (its outputs are
    meaningless but finite). ``state`` from :meth:`initial_state` or an earlier output; it is a value: a call
    never changes what an older state means.
    """

    config: DecoderConfig
    adapters: tuple[Any, ...] = ()  # those on top, oldest first: kept by tokenformer.adapters.apply alone
    blocks: nn.ModuleList
    head: nn.Module  # head(hidden [..., d]) -> logits [..., v]; has .weight [v, d] and .logit_scale (float)

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        state: Any | None = None,
        logits_to_keep: int | None = None,
    ) -> ModelOutput:
        """Logits for every position, or for the last ``logits_to_keep`` only."""

    @abstractmethod
    def hidden(
        self, tokens: Tensor, *, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Final hidden states [b, t, d], so that a loss never needs all logits at once."""

    @abstractmethod
    def initial_state(self, batch_size: int) -> Any:
        """The state before the first token of ``batch_size`` sequences."""

    def static_state(self, state: Any, length: int) -> Any | None:
        """A copy of ``state`` in memory that stays where it is, with room for ``length`` tokens in all; None where a
        model has none.

        Unlike other states it is no value: a call with it takes one token of each sequence (``tokens`` [b, 1], without
        ``positions`` and ``documents``), changes it in place and returns it, by the same operations on the same memory
        every time, so that the call can be recorded once and replayed. Padding on the left stays out of sight.
        """
        return None

    @abstractmethod
    def role_of(self, parameter_name: str) -> str:
        """The role a parameter plays, by which optimiser settings are chosen: ``embedding``, ``norm``,
        ``head``, or an architecture's own (TokenFormer: ``qkv``, ``proj``, ``ffn``)."""
