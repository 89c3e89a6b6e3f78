"""The frame that TokenFormer and Transformer share: embedding, blocks, final norm, head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenformer.layers.attention import (
    DecoderState,
    KeyValueBuffer,
    StaticDecoderState,
    attention_context,
    static_context,
)
from tokenformer.layers.block import Block, Head, TiedHead
from tokenformer.models.base import LanguageModel, ModelOutput
from tokenformer.models.config import DecoderConfig


class Decoder(LanguageModel):
    """A decoder over blocks that the subclass makes; see :class:`~tokenformer.models.base.LanguageModel`."""

    def __init__(self, config: DecoderConfig, blocks: list[Block]) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.tie_word_embeddings:
            self.head: nn.Module = TiedHead(self.embedding, config.logit_scale)
        else:
            self.head = Head(config.vocab_size, config.hidden_size, config.logit_scale)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        state: DecoderState | StaticDecoderState | None = None,
        logits_to_keep: int | None = None,
    ) -> ModelOutput:
        if isinstance(state, StaticDecoderState):
            _check_static(tokens, positions, documents, state)
            return ModelOutput(self.head(self._run_static(tokens, state)), state)
        hidden, state = self._run(tokens, positions, documents, state)
        if logits_to_keep is not None:
            hidden = hidden[:, max(0, hidden.shape[1] - logits_to_keep) :]
        return ModelOutput(self.head(hidden), state)

    def hidden(
        self, tokens: Tensor, *, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        return self._run(tokens, positions, documents, None)[0]

    def initial_state(self, batch_size: int) -> DecoderState:
        return DecoderState(batch_size, (None,) * len(self.blocks))

    def static_state(self, state: DecoderState, length: int) -> StaticDecoderState:
        b, weight = state.batch_size, self.embedding.weight
        cache = (len(self.blocks), b, self.config.num_attention_heads, length, self.config.head_dim)
        counts = (b, 1 + b)
        static = StaticDecoderState(
            weight.new_zeros(cache),  # what is not filled is masked, not ignored
            weight.new_zeros(cache),
            *(torch.zeros(n, dtype=torch.int64, device=weight.device) for n in counts),
        )
        static.load(state)
        return static

    def role_of(self, parameter_name: str) -> str:
        """``embedding``, ``head``, ``norm``, ``qkv``, ``proj`` or ``ffn``; biases play their layer's role."""
        parts = parameter_name.split(".")
        if parts[0] != "blocks":
            return parts[0]
        if parts[2] in ("attention_norm", "ffn_norm"):
            return "norm"
        if parts[2] == "attention":
            return "proj" if parts[3] == "proj" else "qkv"
        return parts[2]

    def _run(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        state: DecoderState | None,
    ) -> tuple[Tensor, DecoderState | None]:
        _check(tokens, positions, documents, state)
        context, all_documents, next_position = attention_context(
            tokens,
            positions,
            documents,
            state,
            rotary_dim=self.config.rotary_dim,
            rope_theta=self.config.rope_theta,
        )
        x = self.embedding(tokens)  # [b, t] -> [b, t, d]
        buffers = state.buffers if state is not None else (None,) * len(self.blocks)
        kept = []
        for block, buffer in zip(self.blocks, buffers, strict=True):
            x, buffer = block(x, context, buffer)
            kept.append(buffer)
        hidden = self.norm(x)
        if state is None:
            return hidden, None
        length = state.length + tokens.shape[1]
        return hidden, DecoderState(state.batch_size, tuple(kept), length, all_documents, next_position)

    def _run_static(self, tokens: Tensor, state: StaticDecoderState) -> Tensor:
        config = self.config
        context = static_context(state, rotary_dim=config.rotary_dim, rope_theta=config.rope_theta)
        x = self.embedding(tokens)  # [b, 1] -> [b, 1, d]
        for layer, block in enumerate(self.blocks):
            buffer = KeyValueBuffer(state.keys[layer], state.values[layer], used=0)
            x, _ = block(x, context, buffer)
        state.advance()
        return self.norm(x)


def _check_static(
    tokens: Tensor, positions: Tensor | None, documents: Tensor | None, state: StaticDecoderState
) -> None:
    if tokens.shape != (state.batch_size, 1):
        raise ValueError(
            f"tokens: found shape {list(tokens.shape)}, expected [{state.batch_size}, 1] with this static state"
        )
    if positions is not None or documents is not None:
        raise ValueError("positions, documents: a static state has its own")


def _check(
    tokens: Tensor, positions: Tensor | None, documents: Tensor | None, state: DecoderState | None
) -> None:
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens: found shape {list(tokens.shape)}, expected [b, t] with t at least 1")
    for name, given in (("positions", positions), ("documents", documents)):
        if given is not None and given.shape != tokens.shape:
            raise ValueError(
                f"{name}: found shape {list(given.shape)}, expected that of tokens, {list(tokens.shape)}"
            )
    if state is not None and state.batch_size != tokens.shape[0]:
        raise ValueError(f"tokens: {tokens.shape[0]} rows, but the state was made for {state.batch_size}")


@torch.no_grad()
def draw_normal(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill ``parameter`` in place with normal numbers of the given standard deviation."""
    parameter.normal_(0.0, std, generator=generator)
