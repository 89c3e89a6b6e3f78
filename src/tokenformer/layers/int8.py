"""Layers with weights of 8 bits, for inference: rows of whole numbers from -127 to 127 and a float32 scale a row.

A row is what one number of a product's result is made with: a parameter token's key, all values of one output feature,
an output feature of a linear layer. Away from the kernels of :mod:`tokenformer.ops.decode` a call first makes the
weights of the input's dtype again, for that layer alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenformer.layers.pattention import Pattention
from tokenformer.ops.pattention import pattention

_LARGEST = 127


class Int8Rows(NamedTuple):
    """``weight`` [rows, columns] int8 and ``scale`` [rows] float32, whose product they stand for."""

    weight: Tensor
    scale: Tensor

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[rows, columns]."""
        return (self.weight.float() * self.scale[:, None]).to(dtype)


@torch.no_grad()
def quantize_rows(weight: Tensor) -> Int8Rows:
    """The nearest such rows to ``weight`` [rows, columns]; the largest entry of a row keeps its value."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1) / _LARGEST
    steps = torch.where(scale > 0, scale, 1.0)[:, None]
    return Int8Rows((wide / steps).round().to(torch.int8), scale)


class Int8Pattention(nn.Module):
    """What a :class:`~tokenformer.layers.pattention.Pattention` computes, [..., d_in] -> [..., d_out], in 8 bits.

    Args:
        layer: its growth groups are joined.
    """

    key_weight: Tensor  # [n, d_in]
    key_scale: Tensor
    value_weight: Tensor  # [d_out, n]
    value_scale: Tensor

    def __init__(self, layer: Pattention) -> None:
        super().__init__()
        self.kind = layer.kind
        _register(self, "key", quantize_rows(torch.cat(list(layer.key_tokens))))
        _register(self, "value", quantize_rows(torch.cat(list(layer.value_tokens)).t()))

    @property
    def keys(self) -> Int8Rows:
        """A row for each parameter token."""
        return Int8Rows(self.key_weight, self.key_scale)

    @property
    def values(self) -> Int8Rows:
        """A row for each output feature, over the parameter tokens."""
        return Int8Rows(self.value_weight, self.value_scale)

    def forward(self, x: Tensor) -> Tensor:
        keys, values = self.keys.dequantized(x.dtype), self.values.dequantized(x.dtype)
        return pattention(x, [keys], [values.t().contiguous()], self.kind)


class Int8Linear(nn.Module):
    """What an ``nn.Linear`` computes, in 8 bits; the bias keeps its dtype."""

    weight: Tensor  # [out, in]
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        rows = quantize_rows(layer.weight)
        self.register_buffer("weight", rows.weight)
        self.register_buffer("scale", rows.scale)
        self.bias = layer.bias

    @property
    def rows(self) -> Int8Rows:
        """A row for each output feature."""
        return Int8Rows(self.weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rows.dequantized(x.dtype), self.bias)


class Int8Head(nn.Module):
    """The logits of a head, in 8 bits; an embedding it was tied to stays as it is."""

    vocabulary_weight: Tensor  # [v, d]
    vocabulary_scale: Tensor

    def __init__(self, weight: Tensor, logit_scale: float) -> None:
        super().__init__()
        _register(self, "vocabulary", quantize_rows(weight))
        self.dtype = weight.dtype
        self.logit_scale = logit_scale

    @property
    def rows(self) -> Int8Rows:
        """A row for each id."""
        return Int8Rows(self.vocabulary_weight, self.vocabulary_scale)

    @property
    def weight(self) -> Tensor:
        """[v, d], made anew."""
        return self.rows.dequantized(self.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.rows.dequantized(hidden.dtype))
        return logits if self.logit_scale == 1.0 else logits * self.logit_scale


def _register(module: nn.Module, name: str, rows: Int8Rows) -> None:
    module.register_buffer(f"{name}_weight", rows.weight.contiguous())
    module.register_buffer(f"{name}_scale", rows.scale)
