"""One token of a few sequences through a decoder, in kernels that read each weight once for all of them.

The vectors of a product are made once, by a kernel of their own, which also adds up the parts that the splits of the
product before it left (:mod:`tokenformer.ops.decode_batch`). The residual stream, scores and sums are float32, and a
vector is two numbers of the weights' type, so that the logits are as near as those of :class:`FusedStep`. Axis letters:
k splits, b sequences, p projections, d hidden, h heads, v vocabulary, T capacity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tokenformer.generation.kernels import serve_model
from tokenformer.generation.products import Product, angle_table, decoder_products, launches_of
from tokenformer.layers.attention import StaticDecoderState
from tokenformer.models.base import LanguageModel
from tokenformer.models.decoder import Decoder

if TYPE_CHECKING:
    from tokenformer.ops.decode import Launch, Normed
    from tokenformer.ops.decode_batch import BatchTile

_LARGEST_BATCH = 32
_DTYPES = (torch.bfloat16, torch.float16)
_MOST_ATTENTION_SPLITS = 8
_MOST_QKV_SPLITS = 4  # each program of attention adds them up
_ATTENTION_PROGRAMS = 264  # two for each multiprocessor of a Hopper GPU
_PAUSES = 2  # a product, and the vectors of the next


class _Plan(NamedTuple):
    """How a product is done: its tile, memory for the parts of its result [k, b, p, rows], and for the vectors [b,
    terms, p, columns] that are made of the parts of the product before it (None for a first product)."""

    tile: BatchTile
    parts: Tensor
    vectors: Tensor | None


def serves(model: LanguageModel, batch_size: int) -> bool:
    """Whether :class:`BatchedStep` is made for this model: several sequences, weights of 16 or 8 bits."""
    return (
        1 < batch_size <= _LARGEST_BATCH
        and serve_model(model)
        and all(parameter.dtype in _DTYPES for parameter in model.parameters())
    )


class BatchedStep:
    """Logits after one token of each sequence; the state moves on by one.

    Args:
        model: one that :func:`serves` admits, or one in float32.
        state: its static state, of any content.
    """

    def __init__(self, model: LanguageModel, state: StaticDecoderState) -> None:
        from tokenformer.ops.decode import Launch
        from tokenformer.ops.decode_batch import terms_of

        assert isinstance(model, Decoder)
        config, device = model.config, state.keys.device
        b, d, heads = state.batch_size, config.hidden_size, config.num_attention_heads
        self._batch = b
        self._products = products = decoder_products(model)
        self._dtype = products.table.dtype  # that is multiplied
        self._angles = angle_table(state.capacity, config.rotary_dim, config.rope_theta, device)
        self._launches = launches_of(products, _PAUSES)
        self._launch = Launch(hopper=self._launches[0].hopper)  # of kernels that make vectors
        self._x = _floats(device, b, 1, d)
        self._vectors = torch.empty(b, terms_of(self._dtype), 1, d, dtype=self._dtype, device=device)
        splits = _attention_splits(b, heads, state.capacity)
        self._attended = _floats(device, b, splits, heads, d // heads)
        self._statistics = _floats(device, b, splits, heads)
        first = products.layers[0]  # all are of one form
        self._qkv = self._plan(first.qkv, _MOST_QKV_SPLITS)
        self._proj, self._ffn = self._plan(first.proj), self._plan(first.ffn)
        self._last = [Product(None, products.head)]
        self._head = self._plan(self._last, most_splits=1)

    def __call__(self, tokens: Tensor, state: StaticDecoderState) -> Tensor:
        """``tokens`` [b, 1] to logits [b, v] float32, in memory that the next call overwrites."""
        from tokenformer.ops.decode import look_up

        products = self._products
        launches = iter(self._launches)
        look_up(tokens.contiguous(), products.table, self._x, launch=next(launches))
        added: Tensor | None = None  # what is to be added to the residual stream
        for number, layer in enumerate(products.layers):
            qkv = self._multiply(layer.qkv, self._qkv, launches, self._normed(layer.attention_norm, added))
            attended = self._attend(number, qkv, state, next(launches))
            added = self._multiply(layer.proj, self._proj, launches, attended)
            normed = self._normed(layer.ffn_norm, added)
            added = self._multiply(layer.ffn, self._ffn, launches, normed)
        normed = self._normed(products.norm, added)
        logits = self._multiply(self._last, self._head, launches, normed, alpha=products.logit_scale)
        state.advance()
        return logits[0, :, 0]

    def _normed(self, norm: Normed, added: Tensor | None) -> Tensor:
        """The layer norm of the residual stream, to which ``added`` [k, b, 1, d] comes first."""
        from tokenformer.ops.decode_batch import make_vectors

        make_vectors(added, norm, self._vectors, stream=self._x, launch=self._launch)
        return self._vectors

    def _attend(self, layer: int, qkv: Tensor, state: StaticDecoderState, launch: Launch) -> Tensor:
        """Attention of queries, keys and values [k, b, 3, d] over the cache of a layer."""
        from tokenformer.ops.decode import Attended, attention
        from tokenformer.ops.decode_batch import join_attention

        is_whole = self._attended.shape[1] == 1
        attention(
            qkv,
            (state.keys[layer], state.values[layer]),
            self._angles,
            state.length,
            state.starts,
            state.positions,
            self._vectors if is_whole else self._attended,
            None if is_whole else self._statistics,
            launch=launch,
        )
        if not is_whole:
            join_attention(self._attended, Attended(self._statistics), self._vectors, launch=self._launch)
        return self._vectors

    def _multiply(
        self,
        products: Sequence[Product],
        plans: Sequence[_Plan],
        launches: Iterator[Launch],
        vectors: Tensor,
        *,
        alpha: float = 1.0,
    ) -> Tensor:
        """One product after another, the first of these vectors: the parts of the last."""
        from tokenformer.ops.decode_batch import make_vectors, multiply_batch

        for number, (product, plan) in enumerate(zip(products, plans, strict=True)):
            if product.how is not None and plan.vectors is not None:
                make_vectors(plans[number - 1].parts, product.how, plan.vectors, launch=self._launch)
                vectors = plan.vectors
            launch = next(launches)
            multiply_batch(vectors, product.matrix, plan.parts, alpha=alpha, launch=launch, tile=plan.tile)
        return plan.parts

    def _plan(self, products: Sequence[Product], most_splits: int = 16) -> list[_Plan]:
        from tokenformer.ops.decode_batch import choose_batch_tile, gpu_of, terms_of

        plans = []
        vectors_read, gpu = self._batch * terms_of(self._dtype), gpu_of(self._x.device)
        for product in products:
            projections, rows, columns = product.matrix.weight.shape
            tile = choose_batch_tile(projections * rows, columns, most_splits, vectors=vectors_read, gpu=gpu)
            vectors = None
            if product.how is not None:
                shape = self._batch, terms_of(self._dtype), projections, columns
                vectors = torch.empty(shape, dtype=self._dtype, device=self._x.device)
            parts = _floats(self._x.device, tile.splits(columns), self._batch, projections, rows)
            plans.append(_Plan(tile, parts, vectors))
        return plans


def _attention_splits(batch: int, heads: int, capacity: int) -> int:
    """Programs that share the cache of a head: so many that all multiprocessors have two."""
    from tokenformer.ops.decode import KEYS_A_BLOCK

    wanted = max(1, _ATTENTION_PROGRAMS // (batch * heads))
    return min(_MOST_ATTENTION_SPLITS, wanted, -(-capacity // KEYS_A_BLOCK))


def _floats(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)
