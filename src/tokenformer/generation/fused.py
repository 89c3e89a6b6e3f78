"""One token through a decoder in few kernels, which read each weight once: the fast path of a static step on a GPU.

A kernel for each product makes its vectors by itself, sequence after sequence: the form for one sequence, and for few
in float32. Vectors between the kernels are float32. Axis letters: b sequences, d hidden, h heads, v vocabulary, T
capacity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenformer.generation.kernels import serve_model
from tokenformer.generation.products import Product, angle_table, decoder_products, launches_of
from tokenformer.layers.attention import StaticDecoderState
from tokenformer.models.base import LanguageModel
from tokenformer.models.decoder import Decoder

if TYPE_CHECKING:
    from tokenformer.ops.decode import Attended, Launch, Normed

_LARGEST_BATCH = 4  # beyond, products of matrices win
_MOST_SPLITS = 8


def serves(model: LanguageModel, batch_size: int) -> bool:
    """Whether :class:`FusedStep` computes what this model does."""
    return batch_size <= _LARGEST_BATCH and serve_model(model)


class FusedStep:
    """Logits after one token of each sequence; the state moves on by one.

    Args:
        model: one that :func:`serves` admits.
        state: its static state, of any content.
    """

    def __init__(self, model: LanguageModel, state: StaticDecoderState) -> None:
        from tokenformer.ops.decode import KEYS_A_BLOCK

        assert isinstance(model, Decoder)
        config, device = model.config, state.keys.device
        b, d, v = state.batch_size, config.hidden_size, config.vocab_size
        self._products = products = decoder_products(model)
        self._angles = angle_table(state.capacity, config.rotary_dim, config.rope_theta, device)
        self._launches = launches_of(products)
        splits = min(_MOST_SPLITS, -(-state.capacity // KEYS_A_BLOCK))
        heads = config.num_attention_heads

        def vectors(*shape: int) -> Tensor:
            return torch.empty(b, *shape, dtype=torch.float32, device=device)

        self._x, self._logits = vectors(1, d), vectors(1, v)
        self._qkv = vectors(3, d)
        self._parts, self._statistics = vectors(splits, heads, d // heads), vectors(splits, heads)
        inner = {
            product.matrix.weight.shape[:2]
            for layer in products.layers
            for part in (layer.qkv, layer.proj, layer.ffn)
            for product in part[:-1]
        }
        self._inner = {shape: vectors(*shape) for shape in inner}

    def __call__(self, tokens: Tensor, state: StaticDecoderState) -> Tensor:
        """``tokens`` [b, 1] to logits [b, v] float32, in memory that the next call overwrites."""
        from tokenformer.ops.decode import Attended, attention, look_up, multiply

        launches = iter(self._launches)
        products = self._products
        look_up(tokens.contiguous(), products.table, self._x, launch=next(launches))
        attended = Attended(self._statistics)
        for number, layer in enumerate(products.layers):
            self._project(self._x, layer.attention_norm, layer.qkv, self._qkv, launches)
            attention(
                self._qkv[None],
                (state.keys[number], state.values[number]),
                self._angles,
                state.length,
                state.starts,
                state.positions,
                self._parts,
                self._statistics,
                launch=next(launches),
            )
            self._project(self._parts, attended, layer.proj, self._x, launches)
            self._project(self._x, layer.ffn_norm, layer.ffn, self._x, launches)
        multiply(
            self._x,
            products.norm,
            products.head,
            self._logits,
            alpha=products.logit_scale,
            launch=next(launches),
        )
        state.advance()
        return self._logits[:, 0]

    def _project(
        self,
        source: Tensor,
        how: Normed | Attended,
        products: Sequence[Product],
        out: Tensor,
        launches: Iterator[Launch],
    ) -> None:
        """Into ``out``, or added to it where that is the residual stream."""
        from tokenformer.ops.decode import multiply

        for number, product in enumerate(products):
            is_last = number == len(products) - 1
            target = out if is_last else self._inner[product.matrix.weight.shape[:2]]
            multiply(
                source,
                product.how or how,
                product.matrix,
                target,
                activate=product.activate,
                residual=target is self._x,
                launch=next(launches),
            )
            source = target
