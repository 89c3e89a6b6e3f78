"""The products of a decoder, their weights in the layout that the kernels of one token read.

Weights of one input lie side by side, growth groups are joined, and Pattention's values transposed. Axis letters: d
hidden, n parameter tokens, T capacity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tokenformer.generation.weight_stream import WeightStore, stream_ahead
from tokenformer.layers.block import Block
from tokenformer.layers.int8 import Int8Head, Int8Linear, Int8Pattention, Int8Rows
from tokenformer.layers.norm import PlainLayerNorm
from tokenformer.layers.pattention import Pattention
from tokenformer.models.decoder import Decoder
from tokenformer.models.transformer.model import MLP
from tokenformer.ops.pattention import WeightKind
from tokenformer.ops.rotary import rotary_angles

if TYPE_CHECKING:
    from tokenformer.ops.decode import Launch, Matrix, Normed, Weighed


class Product(NamedTuple):
    """A matrix, what its input vector is made of (None: what the caller says), and whose scores come out, if any's."""

    how: Weighed | None
    matrix: Matrix
    activate: WeightKind | None = None


class LayerProducts(NamedTuple):
    """The products of one block, in the order they are taken; the last of each adds to the residual stream."""

    attention_norm: Normed
    qkv: list[Product]
    proj: list[Product]
    ffn_norm: Normed
    ffn: list[Product]


class DecoderProducts(NamedTuple):
    """All that a token goes through: ``table`` [v, d], its rows the embedding; the layers, whose weights lie one after
    another in ``memory``; the last norm, and the head with the factor of its logits."""

    table: Tensor
    layers: list[LayerProducts]
    memory: Tensor
    norm: Normed
    head: Matrix
    logit_scale: float


def decoder_products(model: Decoder) -> DecoderProducts:
    """Of a decoder that the kernels serve."""
    head = model.head
    layers, memory = _stored(map(_layer_products, model.blocks), len(model.blocks))
    return DecoderProducts(
        model.embedding.weight.detach(),
        layers,
        memory,
        _normed(model.norm),
        _matrix([head.rows if isinstance(head, Int8Head) else head.weight]),  # type: ignore[list-item]
        float(head.logit_scale),  # type: ignore[arg-type]
    )


def _layer_products(block: nn.Module) -> LayerProducts:
    """The products of a block."""
    assert isinstance(block, Block)
    attention = block.attention
    return LayerProducts(
        _normed(block.attention_norm),
        _projections((attention.query, attention.key, attention.value)),
        _projections((attention.proj,)),
        _normed(block.ffn_norm),
        _mlp(block.ffn) if isinstance(block.ffn, MLP) else _projections((block.ffn,)),
    )


def _normed(norm: nn.Module) -> Normed:
    """What this layer norm makes."""
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


def angle_table(length: int, rotary_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, r] of every position."""
    if not rotary_dim:
        nothing = torch.zeros(length, 0, device=device)
        return nothing, nothing
    cos, sin = rotary_angles(torch.arange(length, device=device)[None], rotary_dim, theta)
    return cos[0, 0].contiguous(), sin[0, 0].contiguous()


def _stored(layers: Iterable[LayerProducts], count: int) -> tuple[list[LayerProducts], Tensor]:
    """The layers with their weights one after another in one memory; all ``count`` are of one form."""
    stored: list[LayerProducts] = []
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


def _products(layer: LayerProducts) -> list[Product]:
    return [*layer.qkv, *layer.proj, *layer.ffn]


def launches_of(products: DecoderProducts, pauses: int = 1) -> list[Launch]:
    """Of the embedding, products and attention of each layer, and the head, in this order; ``pauses`` as in
    :func:`stream_ahead`."""
    from tokenformer.ops.decode import Launch

    sizes = []
    for layer in products.layers:
        sizes += [product.matrix.weight.nbytes for product in layer.qkv]
        sizes.append(0)  # attention
        sizes += [product.matrix.weight.nbytes for product in (*layer.proj, *layer.ffn)]
    device = products.memory.device
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    if not is_nvidia or torch.cuda.get_device_capability(device) < (9, 0):
        return [Launch()] * (len(sizes) + 2)
    parts, first = stream_ahead(products.memory, sizes, pauses)
    # the first weights of the next token come while the head is computed
    return [Launch(hopper=True, coming=part) for part in (None, *parts, first)]
