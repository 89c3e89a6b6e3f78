"""Which dtype autocast asks for, on every kind of device (the meta device knows no autocast)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products with ``x`` run in: autocast's where it is on, otherwise that of ``x``.

    As in torch's own operations, float64 stays.
    """
    device_type = x.device.type
    # not torch.amp.is_autocast_available: torch 2.11 breaks the compiled graph there, and the gradients with it
    if x.dtype == torch.float64 or device_type == "meta":
        return x.dtype
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside, operations run in the dtypes of their arguments."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
