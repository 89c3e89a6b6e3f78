"""Self-attention over any four projections, and the state that lets it go on token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenformer.layers.pattention import project_together
from tokenformer.ops.attention import PADDING_DOCUMENT, causal_attention, document_mask, document_positions
from tokenformer.ops.rotary import apply_rotary, rotary_angles

_FIRST_CAPACITY = 256


@dataclass
class KeyValueBuffer:
    """Keys and values of one layer, [b, h, capacity, e], shared by successive states; ``used`` are filled."""

    key: Tensor
    value: Tensor
    used: int


@dataclass(frozen=True)
class DecoderState:
    """What the next call of a decoder continues from.

    A value: a later call may fill the shared buffers behind ``length``, never before it, and a call that
    continues from an older state copies first. ``documents`` [b, length] int64 is None while every row is one
    unpadded document; ``next_position`` [b] int64 is None while it equals ``length`` in every row.
    """

    batch_size: int
    buffers: tuple[KeyValueBuffer | None, ...]
    length: int = 0
    documents: Tensor | None = None
    next_position: Tensor | None = None


@dataclass(frozen=True)
class StaticDecoderState:
    """What one-token calls of a decoder continue from, in memory that stays where it is: each call changes it.

    ``keys`` and ``values`` [L, b, h, T, e], a part for each layer. int64: ``starts`` [b], the first token in them that
    is no padding; ``counters`` [1 + b], which go up by one with each token: ``length`` and ``positions``.
    """

    keys: Tensor
    values: Tensor
    starts: Tensor
    counters: Tensor

    @property
    def length(self) -> Tensor:
        """[1], the tokens in ``keys`` and ``values``."""
        return self.counters[:1]

    @property
    def positions(self) -> Tensor:
        """[b], of the next token."""
        return self.counters[1:]

    @property
    def batch_size(self) -> int:
        """b."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """T."""
        return self.keys.shape[3]

    def advance(self) -> None:
        """One more token is in."""
        self.counters.add_(1)

    def rewind(self) -> None:
        """As before the first token."""
        self.counters.zero_()

    def load(self, state: DecoderState) -> None:
        """Become a copy of ``state``."""
        used = state.length
        for layer, buffer in enumerate(state.buffers):
            if buffer is not None:
                self.keys[layer, :, :, :used] = buffer.key[:, :, :used]
                self.values[layer, :, :, :used] = buffer.value[:, :, :used]
        self.length.fill_(used)
        padding = 0 if state.documents is None else (state.documents == PADDING_DOCUMENT).sum(dim=1)
        self.starts.copy_(torch.as_tensor(padding))
        self.positions.copy_(torch.as_tensor(used if state.next_position is None else state.next_position))


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one call share.

    ``cos`` and ``sin`` [b or 1, 1, t, r], None without rotary positions; ``mask`` [b, 1, t, s] bool, None for
    plain causal attention; ``past`` earlier positions; ``keep`` whether keys and values are kept for a next call;
    ``slot`` [1], where in static buffers they go.
    """

    cos: Tensor | None
    sin: Tensor | None
    mask: Tensor | None
    past: int
    keep: bool
    slot: Tensor | None = None


class SelfAttention(nn.Module):
    """Causal multi-head attention; ``query``, ``key``, ``value``, ``proj`` map [..., d] to [..., d]."""

    def __init__(
        self, query: nn.Module, key: nn.Module, value: nn.Module, proj: nn.Module, num_heads: int
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.proj = query, key, value, proj
        self.num_heads = num_heads

    def forward(
        self, x: Tensor, context: AttentionContext, buffer: KeyValueBuffer | None
    ) -> tuple[Tensor, KeyValueBuffer | None]:
        """[b, t, d] -> [b, t, d], and the buffer for the next call where ``context.keep`` asks for it."""
        projected = project_together((self.query, self.key, self.value), x)
        query, key, value = (self._split(projection) for projection in projected)
        if context.cos is not None and context.sin is not None:
            query = apply_rotary(query, context.cos, context.sin)
            key = apply_rotary(key, context.cos, context.sin)
        if context.slot is not None and buffer is not None:
            key = buffer.key.index_copy_(2, context.slot, key)
            value = buffer.value.index_copy_(2, context.slot, value)
        elif context.keep:
            total = context.past + key.shape[2]
            buffer = _append(buffer, context.past, key, value)
            key, value = buffer.key[:, :, :total], buffer.value[:, :, :total]
        out = causal_attention(query, key, value, context.mask)  # [b, h, t, e]
        return self.proj(out.transpose(1, 2).flatten(2)), buffer

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [b, t, d] -> [b, h, t, e]


def attention_context(
    tokens: Tensor,
    positions: Tensor | None,
    documents: Tensor | None,
    state: DecoderState | None,
    *,
    rotary_dim: int,
    rope_theta: float,
) -> tuple[AttentionContext, Tensor | None, Tensor | None]:
    """Angles and mask of a call.

    Args:
        tokens: [b, t].
        positions: [b, t] or None, counted from each document's start.
        documents: [b, t] or None, the document of the row's last token (one for all at first).
        state: what the call continues from, or None.
        rotary_dim: rotated features of each head, 0 for no positions.
        rope_theta: base of the rotary angles.

    Returns:
        The context; the documents [b, past + t] and next positions [b] of the state after this call, or None
        where they are the plain ones.
    """
    b, t = tokens.shape
    past = state.length if state is not None else 0
    past_documents = state.documents if state is not None else None
    next_position = state.next_position if state is not None else None
    mask = None
    if documents is not None or past_documents is not None:
        if past_documents is None:
            past_documents = tokens.new_zeros(b, past)
        last = past_documents[:, -1] if past else tokens.new_full((b,), -1)
        if documents is None:
            documents = last[:, None].expand(b, t)
        if positions is None:
            start = next_position if next_position is not None else tokens.new_full((b,), past)
            positions = document_positions(documents, last, start)
        past_documents = torch.cat((past_documents, documents), dim=1)
        mask = document_mask(documents, past_documents)
    after = positions[:, -1] + 1 if positions is not None else None
    if positions is None:
        steps = torch.arange(t, device=tokens.device)[None]
        positions = steps + (next_position[:, None] if next_position is not None else past)
        after = next_position + t if next_position is not None else None
    cos, sin = rotary_angles(positions, rotary_dim, rope_theta) if rotary_dim else (None, None)
    return AttentionContext(cos, sin, mask, past, keep=state is not None), past_documents, after


def static_context(state: StaticDecoderState, *, rotary_dim: int, rope_theta: float) -> AttentionContext:
    """Angles and mask of the next token after a static state."""
    positions = state.positions[:, None]
    cos, sin = rotary_angles(positions, rotary_dim, rope_theta) if rotary_dim else (None, None)
    index = torch.arange(state.capacity, device=state.keys.device)
    mask = (index >= state.starts[:, None]) & (index <= state.length)  # [b, T]
    return AttentionContext(cos, sin, mask[:, None, None], past=0, keep=True, slot=state.length)


def _append(buffer: KeyValueBuffer | None, past: int, key: Tensor, value: Tensor) -> KeyValueBuffer:
    """A buffer with ``past`` earlier positions and the new ones; filled in place where no other state is hurt."""
    total = past + key.shape[2]
    if torch.is_grad_enabled():  # what a backward needs must not be written to again
        if buffer is None:
            return KeyValueBuffer(key, value, total)
        key = torch.cat((buffer.key[:, :, :past], key), dim=2)
        value = torch.cat((buffer.value[:, :, :past], value), dim=2)
        return KeyValueBuffer(key, value, total)
    if buffer is None or buffer.used != past or total > buffer.key.shape[2]:
        buffer = _copy_with_room(buffer, past, key, total)
    buffer.key[:, :, past:total] = key
    buffer.value[:, :, past:total] = value
    buffer.used = total
    return buffer


def _copy_with_room(buffer: KeyValueBuffer | None, past: int, like: Tensor, total: int) -> KeyValueBuffer:
    batch, heads, _, features = like.shape
    capacity = max(
        _FIRST_CAPACITY, 1 << (total - 1).bit_length()
    )  # doubling: each position is copied O(1) times
    key, value = (like.new_empty(batch, heads, capacity, features) for _ in range(2))
    if buffer is not None:
        key[:, :, :past] = buffer.key[:, :, :past]
        value[:, :, :past] = buffer.value[:, :, :past]
    return KeyValueBuffer(key, value, past)
