"""A model's weights in fewer bits, for inference."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from tokenformer.errors import TokenFormerError
from tokenformer.layers.int8 import Int8Head, Int8Linear, Int8Pattention
from tokenformer.layers.pattention import Pattention
from tokenformer.models.base import LanguageModel

Quantization = Literal["int8"]


def quantize_model(model: LanguageModel, quantization: Quantization = "int8") -> None:
    """Round the weights of all products to 8 bits, in place; there is no way back, and no training.

    Weight-only and symmetric, with a float32 scale for each parameter token's key, each output feature of the values or
    of a linear layer, and each row of the head. The embedding, norms, biases and activations keep their dtype.
    Growth groups and adapters become one with their layers.

    Raises:
        TokenFormerError: an unknown quantization, or a model that is quantized already.
    """
    if quantization not in get_args(Quantization):
        raise TokenFormerError(
            f"quantize: found '{quantization}', expected {', '.join(get_args(Quantization))}"
        )
    if isinstance(model.head, Int8Head):
        raise TokenFormerError("quantize: the model's weights are int8 already")
    for parent in list(model.blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Pattention):
                setattr(parent, name, Int8Pattention(child))
            elif isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    model.head = Int8Head(model.head.weight, float(model.head.logit_scale))  # type: ignore[arg-type]
    model.adapters = ()
