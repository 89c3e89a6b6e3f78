"""One token of one sequence through a TokenFormer, its layers in a single kernel: see :mod:`ops.decode_layers_triton`.

The weights are copied into one memory in the order of use. Axis letters: d hidden, n parameter tokens, v vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenformer.generation.fused import angle_table, fused_layer, head_matrix, serves
from tokenformer.generation.weight_stream import WeightStore
from tokenformer.layers.attention import StaticDecoderState
from tokenformer.layers.block import Block
from tokenformer.layers.norm import PlainLayerNorm
from tokenformer.layers.pattention import Pattention
from tokenformer.models.base import LanguageModel
from tokenformer.models.decoder import Decoder

if TYPE_CHECKING:
    from tokenformer.ops.decode_layers import Cache, Shape, Tau
    from tokenformer.ops.pattention import WeightKind

_MOST_SPLITS = 8


def serves_streamed(model: LanguageModel, batch_size: int) -> bool:
    """Whether :class:`StreamedStep` computes what this model does."""
    if batch_size != 1 or not serves(model, 1):
        return False
    assert isinstance(model, Decoder)
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    layers = [_layers(block) for block in blocks]
    if not all(type(layer) is Pattention for found in layers for layer in found):
        return False
    if not all(type(norm) is PlainLayerNorm for b in blocks for norm in (b.attention_norm, b.ffn_norm)):
        return False
    return _shape(model).is_served() and len({_form(block) for block in blocks}) == 1


class StreamedStep:
    """Logits after one token; the state moves on by one.

    Args:
        model: one that :func:`serves_streamed` admits.
        state: its static state, of any content.
        meet: all layers in one launch, on a GPU; otherwise a launch for each phase.
    """

    def __init__(self, model: LanguageModel, state: StaticDecoderState, *, meet: bool | None = None) -> None:
        from tokenformer.ops.decode import KEYS_A_BLOCK, Launch, Normed
        from tokenformer.ops.decode_layers import Layers, Space, programs_on

        assert isinstance(model, Decoder)
        device = state.keys.device
        self._meet = device.type == "cuda" if meet is None else meet
        config, shape, programs = model.config, _shape(model), programs_on(device)
        space = Space(shape, min(_MOST_SPLITS, -(-state.capacity // KEYS_A_BLOCK)), device)
        angles = angle_table(state.capacity, config.rotary_dim, config.rope_theta, device)
        stream = _stored(model, shape, programs)
        self.layers = Layers(stream, space, angles, shape, *_form(model.blocks[0]), programs)
        self._x = space.residual(shape.hidden)
        self._table = model.embedding.weight.detach()
        self._norm = Normed(model.norm.eps, model.norm.weight.detach(), model.norm.bias.detach())
        self._head = head_matrix(model.head)
        self._logit_scale = float(model.head.logit_scale)  # type: ignore[arg-type]
        self._logits = torch.empty(1, 1, config.vocab_size, dtype=torch.float32, device=device)
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._launch = Launch(hopper=hopper and torch.version.cuda is not None)

    def __call__(self, tokens: Tensor, state: StaticDecoderState) -> Tensor:
        """``tokens`` [1, 1] to logits [1, v] float32, in memory that the next call overwrites."""
        from tokenformer.ops.decode import look_up, multiply

        counters = self.layers.space.counters
        look_up(tokens.contiguous(), self._table, self._x, zeroed=counters, launch=self._launch)
        self.layers.run(cache_of(state), meet=self._meet)
        multiply(self._x, self._norm, self._head, self._logits, alpha=self._logit_scale, launch=self._launch)
        state.advance()
        return self._logits[:, 0]


def cache_of(state: StaticDecoderState) -> Cache:
    """The state as the kernel takes it."""
    from tokenformer.ops.decode_layers import Cache

    return Cache(state.keys, state.values, state.length, state.starts, state.positions)


def _stored(model: Decoder, shape: Shape, programs: int) -> Tensor:
    """The weights in the order of use."""
    from tokenformer.ops.decode_layers import ROWS, values_order

    phases, size = shape.phases(), ROWS * shape.hidden
    weight = model.embedding.weight
    store = WeightStore([sum(phases) * len(model.blocks) * size], weight.dtype, weight.device)
    order = values_order(phases[1], programs).to(weight.device)
    for block in model.blocks:
        layer = fused_layer(block)
        qkv_keys, qkv_values = (product.matrix.weight for product in layer.qkv)
        store.add(qkv_keys)
        store.add(qkv_values.reshape(-1, size)[order])
        for product in (*layer.proj, *layer.ffn):
            store.add(product.matrix.weight)
    return store.memory


def _layers(block: Block) -> tuple[torch.nn.Module, ...]:
    attention = block.attention
    return attention.query, attention.key, attention.value, attention.proj, block.ffn


def _shape(model: Decoder) -> Shape:
    from tokenformer.ops.decode_layers import Shape

    block = model.blocks[0]
    assert isinstance(block, Block)
    query, _, _, proj, ffn = _layers(block)
    assert isinstance(query, Pattention)
    assert isinstance(proj, Pattention)
    assert isinstance(ffn, Pattention)
    config = model.config
    counts = (layer.num_param_tokens for layer in (query, proj, ffn))
    return Shape(config.hidden_size, config.num_attention_heads, *counts)


def _form(block: torch.nn.Module) -> tuple[WeightKind, Tau, float]:
    """What all layers must have in common."""
    from tokenformer.ops.decode_layers import Tau

    assert isinstance(block, Block)
    kinds = [layer.kind for layer in _layers(block) if isinstance(layer, Pattention)]
    assert isinstance(block.ffn_norm, PlainLayerNorm)
    tau = Tau(kinds[0].tau, kinds[3].tau, kinds[4].tau)
    return kinds[0]._replace(tau=1.0), tau, block.ffn_norm.eps
