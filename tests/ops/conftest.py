"""Counting matrix products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"}


class ProductCounter(TorchDispatchMode):
    """Counts the matrix products that run inside; ``count`` is how many."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in _PRODUCTS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def product_counter() -> type[ProductCounter]:
    torch.manual_seed(0)
    return ProductCounter
