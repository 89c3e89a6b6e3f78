"""Groups of parameter tokens as the operators of a GPU take them: one matrix, and one gradient for each group back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def one_matrix(groups: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All groups as a product takes them, apart from autograd; a compiler makes one kernel of it."""
    parts = [group.detach().to(dtype) for group in groups]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def gradients_of_groups(
    grad: Tensor, sizes: Sequence[int], wanted: Sequence[bool], dtype: torch.dtype
) -> list[Tensor | None]:
    """The parts of ``grad`` [sum of sizes, features] that are wanted, in ``dtype``; it may be empty where none is."""
    parts = grad.split(list(sizes)) if any(wanted) else [grad] * len(sizes)
    return [part.to(dtype) if want else None for part, want in zip(parts, wanted, strict=True)]
