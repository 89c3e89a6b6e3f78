"""How far an adapter moves what its base contributes, through the norms of ``l2_norm_gelu`` and ``gelu_l2_norm``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenformer.adapters.directory import pattention_layers
from tokenformer.errors import TokenFormerError
from tokenformer.layers.pattention import Pattention
from tokenformer.models.base import LanguageModel
from tokenformer.ops.pattention import attention_weights


@torch.no_grad()
def base_shift(model: LanguageModel, tokens: Tensor) -> dict[str, float]:
    """For each Pattention layer with tokens of an adapter, |c' - c| / |c|, over all rows: c is what the base's tokens
    add to the output alone, c' what the same tokens add beside the adapter's, for the same inputs.

    The inputs are those that the layer sees in ``model`` with its adapters. 0 for ``gelu``, whose tokens know nothing
    of each other.

    Args:
        model: with adapters loaded.
        tokens: [b, t] int64, on the model's device.

    Raises:
        TokenFormerError: the model has no adapter.
    """
    if not model.adapters:
        raise TokenFormerError("base_shift: the model has no adapter")
    base = model.adapters[0].before
    shifts: dict[str, float] = {}
    handles = []
    for name, (role, layer) in pattention_layers(model).items():
        groups = len(base.groups(role))
        if len(layer.groups) > groups:

            def measure(layer: Pattention, args: Sequence[Tensor], name: str = name, k: int = groups) -> None:
                shifts[name] = _shift(layer, args[0], k)

            handles.append(layer.register_forward_pre_hook(measure))
    try:
        model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return shifts


def _shift(layer: Pattention, x: Tensor, groups: int) -> float:
    scores = [F.linear(x, keys) for keys in layer.key_tokens]
    alone = attention_weights(scores[:groups], layer.kind)
    beside = attention_weights(scores, layer.kind)[:groups]
    before, after = (
        sum(w @ values.to(w.dtype) for w, values in zip(weights, layer.value_tokens, strict=False))
        for weights in (alone, beside)
    )
    return float((after - before).norm() / before.norm())
