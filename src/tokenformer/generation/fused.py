"""One token through a decoder in few kernels, which read each weight once: the fast path of a static step on a GPU.

The weights are copied into the layout that the kernels read: those of one input side by side, growth groups joined, and
Pattention's values transposed. Vectors between the kernels are float32. Axis letters: b sequences, d hidden, h heads, n
parameter tokens, v vocabulary, T capacity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tokenformer.generation.kernels import has_triton
from tokenformer.generation.weight_stream import WeightStore, stream_ahead
from tokenformer.layers.attention import SelfAttention, StaticDecoderState
from tokenformer.layers.block import Block
from tokenformer.layers.int8 import Int8Head, Int8Linear, Int8Pattention, Int8Rows
from tokenformer.layers.norm import PlainLayerNorm
from tokenformer.layers.pattention import Pattention, is_plain
from tokenformer.models.base import LanguageModel
from tokenformer.models.decoder import Decoder
from tokenformer.models.tokenformer.config import ROLES, TokenFormerConfig
from tokenformer.models.transformer.model import MLP
from tokenformer.ops.pattention import WeightKind, pattention
from tokenformer.ops.rotary import rotary_angles

if TYPE_CHECKING:
    from tokenformer.ops.decode import Attended, Launch, Matrix, Normed, Weighed

_LARGEST_BATCH = 4  # beyond, products of matrices win
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_COLUMNS = 16384
_MOST_SPLITS = 8


class Product(NamedTuple):
    """A matrix, what its input vector is made of (None: what the caller says), and whose scores come out, if any's."""

    how: Weighed | None
    matrix: Matrix
    activate: WeightKind | None = None


class FusedLayer(NamedTuple):
    """The products of one block, in the order they are taken; the last of each adds to the residual stream."""

    attention_norm: Normed
    qkv: list[Product]
    proj: list[Product]
    ffn_norm: Normed
    ffn: list[Product]


def serves(model: LanguageModel, batch_size: int) -> bool:
    """Whether :class:`FusedStep` computes what this model does."""
    return (
        isinstance(model, Decoder)
        and batch_size <= _LARGEST_BATCH
        and has_triton()
        and all(parameter.dtype in _DTYPES for parameter in model.parameters())
        and _widest(model) <= _MOST_COLUMNS
        and all(_serves_block(block) for block in model.blocks)
    )


def _widest(model: LanguageModel) -> int:
    """Inputs of the matrix that has the most, one row of which a program must hold."""
    config = model.config
    if isinstance(config, TokenFormerConfig):
        return max(config.hidden_size, *(config.param_tokens(role) for role in ROLES))
    return max(config.hidden_size, getattr(config, "mlp_size", 0))


def _serves_block(block: nn.Module) -> bool:
    if type(block) is not Block or block.parallel_residual or type(block.attention) is not SelfAttention:
        return False
    if not {type(block.attention_norm), type(block.ffn_norm)} <= {nn.LayerNorm, PlainLayerNorm}:
        return False
    attention = block.attention
    qkv = (attention.query, attention.key, attention.value)
    projections = (*qkv, attention.proj)
    if all(_serves_layer(layer) for layer in (*projections, block.ffn)):
        return (
            len({(type(layer), layer.kind) for layer in qkv}) == 1 and len(set(map(_token_count, qkv))) == 1
        )
    linear = (nn.Linear, Int8Linear)
    if type(block.ffn) is not MLP or type(block.ffn.up) not in linear or type(block.ffn.down) not in linear:
        return False
    return all(type(layer) in linear for layer in projections) and len(set(map(type, qkv))) == 1


def _serves_layer(layer: nn.Module) -> bool:
    return type(layer) is Int8Pattention or (
        type(layer) is Pattention and is_plain(layer) and layer.op is pattention
    )


def _token_count(layer: nn.Module) -> int:
    if isinstance(layer, Int8Pattention):
        return layer.keys.weight.shape[0]
    assert isinstance(layer, Pattention)
    return layer.num_param_tokens


class FusedStep:
    """Logits after one token of each sequence; the state moves on by one.

    Args:
        model: one that :func:`serves` admits.
        state: its static state, of any content.
    """

    def __init__(self, model: LanguageModel, state: StaticDecoderState) -> None:
        from tokenformer.ops.decode import KEYS_A_BLOCK, Normed

        assert isinstance(model, Decoder)
        config, device = model.config, state.keys.device
        b, d, v = state.batch_size, config.hidden_size, config.vocab_size
        self._layers, memory = _stored(map(fused_layer, model.blocks), len(model.blocks))
        self._table = model.embedding.weight.detach()
        self._norm = Normed(model.norm.eps, model.norm.weight.detach(), model.norm.bias.detach())
        self._head = head_matrix(model.head)
        self._logit_scale = float(model.head.logit_scale)  # type: ignore[arg-type]
        self._angles = angle_table(state.capacity, config.rotary_dim, config.rope_theta, device)
        self._launches = _launches(self._layers, memory)
        splits = min(_MOST_SPLITS, -(-state.capacity // KEYS_A_BLOCK))
        heads = config.num_attention_heads

        def vectors(*shape: int) -> Tensor:
            return torch.empty(b, *shape, dtype=torch.float32, device=device)

        self._x, self._logits = vectors(1, d), vectors(1, v)
        self._qkv = vectors(3, d)
        self._parts, self._statistics = vectors(splits, heads, d // heads), vectors(splits, heads)
        inner = {
            product.matrix.weight.shape[:2]
            for layer in self._layers
            for products in (layer.qkv, layer.proj, layer.ffn)
            for product in products[:-1]
        }
        self._inner = {shape: vectors(*shape) for shape in inner}

    def __call__(self, tokens: Tensor, state: StaticDecoderState) -> Tensor:
        """``tokens`` [b, 1] to logits [b, v] float32, in memory that the next call overwrites."""
        from tokenformer.ops.decode import Attended, attention, look_up, multiply

        launches = iter(self._launches)
        look_up(tokens.contiguous(), self._table, self._x, launch=next(launches))
        attended = Attended(self._statistics)
        for layer, products in enumerate(self._layers):
            self._project(self._x, products.attention_norm, products.qkv, self._qkv, launches)
            attention(
                self._qkv,
                (state.keys[layer], state.values[layer]),
                self._angles,
                state.length,
                state.starts,
                state.positions,
                self._parts,
                self._statistics,
                launch=next(launches),
            )
            self._project(self._parts, attended, products.proj, self._x, launches)
            self._project(self._x, products.ffn_norm, products.ffn, self._x, launches)
        multiply(
            self._x, self._norm, self._head, self._logits, alpha=self._logit_scale, launch=next(launches)
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


def _stored(layers: Iterable[FusedLayer], count: int) -> tuple[list[FusedLayer], Tensor]:
    """The layers with their weights one after another in one memory; all ``count`` are of one form."""
    stored: list[FusedLayer] = []
    store = None
    for layer in layers:
        weights = [product.matrix.weight for product in _products(layer)]
        if store is None:
            sizes = [weight.numel() for weight in weights] * count
            store = WeightStore(sizes, weights[0].dtype, weights[0].device)
        moved = (
            product._replace(matrix=product.matrix._replace(weight=store.add(product.matrix.weight)))
            for product in _products(layer)
        )
        qkv, proj, ffn = (list(islice(moved, len(part))) for part in (layer.qkv, layer.proj, layer.ffn))
        stored.append(layer._replace(qkv=qkv, proj=proj, ffn=ffn))
    assert store is not None
    return stored, store.memory


def _products(layer: FusedLayer) -> list[Product]:
    return [*layer.qkv, *layer.proj, *layer.ffn]


def _launches(layers: Sequence[FusedLayer], memory: Tensor) -> list[Launch]:
    """Of the kernels of a token in their order: embedding, layers, head."""
    from tokenformer.ops.decode import Launch

    sizes = []
    for layer in layers:
        sizes += [product.matrix.weight.nbytes for product in layer.qkv]
        sizes.append(0)  # attention
        sizes += [product.matrix.weight.nbytes for product in (*layer.proj, *layer.ffn)]
    device = memory.device
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    if not is_nvidia or torch.cuda.get_device_capability(device) < (9, 0):
        return [Launch()] * (len(sizes) + 2)
    parts, first = stream_ahead(memory, sizes)
    # the first weights of the next token come while the head is computed
    return [Launch(hopper=True, coming=part) for part in (None, *parts, first)]


def fused_layer(block: nn.Module) -> FusedLayer:
    """The products of a block."""
    assert isinstance(block, Block)
    attention = block.attention
    return FusedLayer(
        _normed(block.attention_norm),
        _projections((attention.query, attention.key, attention.value)),
        _projections((attention.proj,)),
        _normed(block.ffn_norm),
        _mlp(block.ffn) if isinstance(block.ffn, MLP) else _projections((block.ffn,)),
    )


def _normed(norm: nn.Module) -> Normed:
    from tokenformer.ops.decode import Normed

    assert isinstance(norm, nn.LayerNorm | PlainLayerNorm)
    if isinstance(norm, PlainLayerNorm) or norm.weight is None:
        return Normed(norm.eps)
    return Normed(norm.eps, norm.weight.detach(), norm.bias.detach())


def _projections(layers: Sequence[nn.Module]) -> list[Product]:
    """Of layers of one form, which share their input."""
    from tokenformer.ops.decode import Weighed

    first = layers[0]
    if isinstance(first, nn.Linear | Int8Linear):
        return [Product(None, _linear_matrix(layers))]
    assert isinstance(first, Pattention | Int8Pattention)
    keys, values = zip(*map(_tokens, layers), strict=True)
    return [
        Product(None, _matrix(keys), first.kind),
        Product(Weighed(first.kind), _matrix(values)),
    ]


def _tokens(layer: nn.Module) -> tuple[Tensor | Int8Rows, Tensor | Int8Rows]:
    """Keys [n, d] and values [d, n] of a Pattention, its groups joined."""
    if isinstance(layer, Int8Pattention):
        return layer.keys, layer.values
    assert isinstance(layer, Pattention)
    keys, values = list(layer.key_tokens), list(layer.value_tokens)
    return (torch.cat(keys) if len(keys) > 1 else keys[0]), torch.cat(values).t()


def _matrix(parts: Sequence[Tensor | Int8Rows], bias: Tensor | None = None) -> Matrix:
    """The parts [rows, columns] one after another."""
    from tokenformer.ops.decode import Matrix

    weights = [part.weight if isinstance(part, Int8Rows) else part.detach() for part in parts]
    scales = [part.scale for part in parts if isinstance(part, Int8Rows)]
    # one that is there already is not copied
    weight = torch.stack(weights) if len(weights) > 1 else weights[0].contiguous()[None]
    return Matrix(weight, torch.stack(scales) if scales else None, bias)


def _mlp(mlp: MLP) -> list[Product]:
    from tokenformer.ops.decode import Weighed

    gelu = WeightKind("gelu", 1.0, mlp.act.approximate)  # type: ignore[arg-type]
    return [
        Product(None, _linear_matrix([mlp.up]), gelu),
        Product(Weighed(gelu), _linear_matrix([mlp.down])),
    ]


def _linear_matrix(layers: Sequence[nn.Module]) -> Matrix:
    biases = [layer.bias.detach() for layer in layers if isinstance(layer.bias, Tensor)]
    weights = [layer.rows if isinstance(layer, Int8Linear) else layer.weight for layer in layers]
    return _matrix(weights, torch.stack(biases) if biases else None)  # type: ignore[arg-type]


def head_matrix(head: nn.Module) -> Matrix:
    """The weight that makes logits."""
    weight = head.rows if isinstance(head, Int8Head) else head.weight
    return _matrix([weight])  # type: ignore[list-item]


def angle_table(length: int, rotary_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, r] of every position."""
    if not rotary_dim:
        nothing = torch.zeros(length, 0, device=device)
        return nothing, nothing
    cos, sin = rotary_angles(torch.arange(length, device=device)[None], rotary_dim, theta)
    return cos[0, 0].contiguous(), sin[0, 0].contiguous()
