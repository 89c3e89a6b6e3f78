"""Transformers' cache of keys and values as the state of a decoder, and back.

The cache is the truth: beam search reorders it, assisted generation crops it. Buffers with room for further positions
are kept beside it, and used again where the cache still holds exactly what they do, so that a step copies nothing.
"""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tokenformer.errors import TokenFormerError
from tokenformer.layers.attention import DecoderState, KeyValueBuffer

_BUFFERS = "_tokenformer_buffers"


def cache_length(cache: object) -> int:
    """Positions that ``cache`` holds.

    Raises:
        TokenFormerError: a kind of cache that does not grow by concatenation.
    """
    if not isinstance(cache, DynamicCache):
        raise TokenFormerError(
            f"past_key_values: found a {type(cache).__name__}, expected a DynamicCache "
            "(cache_implementation='dynamic', the default)"
        )
    strange = [layer for layer in cache.layers if type(layer) is not DynamicLayer]
    if strange:
        raise TokenFormerError(
            f"past_key_values: found layers of {type(strange[0]).__name__}, expected DynamicLayer"
        )
    return int(cache.get_seq_length())


def state_from_cache(
    cache: DynamicCache, batch_size: int, layers: int, documents: Tensor | None
) -> DecoderState:
    """The state of a decoder after what ``cache`` holds; ``documents`` [b, length] int64 says which positions are
    padding."""
    length = cache_length(cache)
    if length == 0:
        return DecoderState(batch_size, (None,) * layers)
    kept: list[KeyValueBuffer | None] = getattr(cache, _BUFFERS, [None] * layers)
    buffers = tuple(_buffer(layer, old) for layer, old in zip(cache.layers, kept, strict=True))
    return DecoderState(batch_size, buffers, length, documents)


def _buffer(layer: DynamicLayer, kept: KeyValueBuffer | None) -> KeyValueBuffer:
    keys, values = layer.keys, layer.values
    same = (
        kept is not None
        and keys.shape == kept.key[:, :, : keys.shape[2]].shape
        and keys.data_ptr() == kept.key.data_ptr()
        and values.data_ptr() == kept.value.data_ptr()
        and keys.stride() == kept.key.stride()
    )
    return kept if same and kept is not None else KeyValueBuffer(keys, values, keys.shape[2])


def store_state(cache: DynamicCache, state: DecoderState) -> None:
    """Let ``cache`` hold the keys and values of ``state``, as views of its buffers."""
    buffers = [buffer for buffer in state.buffers if buffer is not None]
    while len(cache.layers) < len(buffers):
        cache.layers.append(DynamicLayer())
    for layer, buffer in zip(cache.layers, buffers, strict=True):
        keys, values = (tensor[:, :, : state.length] for tensor in (buffer.key, buffer.value))
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    setattr(cache, _BUFFERS, buffers)
