"""Models without weights, to be filled from files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tokenformer.models.base import LanguageModel
from tokenformer.models.config import DecoderConfig
from tokenformer.models.registry import model_class

_DRAWING = ("normal_", "uniform_", "fill_", "zero_")


class _NothingDrawn(TorchFunctionMode):
    """Initialisation passed over. On the meta device it would do nothing, yet drawing random numbers there makes torch
    import its symbolic shapes, which takes seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or getattr(func, "__name__", "") in _DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(config: DecoderConfig) -> LanguageModel:
    """The model of ``config`` on the meta device: shapes and no numbers, for ``load_state_dict(..., assign=True)``."""
    with torch.device("meta"), _NothingDrawn():
        model: LanguageModel = model_class(config.architecture)(config)
    return model
