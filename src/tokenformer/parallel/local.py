"""What this rank holds of tensors that may be spread over ranks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``, all of a plain one; changes in place reach the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """:func:`local_part` of each."""
    return [local_part(tensor) for tensor in tensors]
