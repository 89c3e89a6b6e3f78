"""Copies of a run's tensors on the CPU, taken between two steps without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Staging:
    """Copies of what each tensor holds on this rank, in memory that is used again for the next copy (page-locked for
    CUDA, so that the device copies by itself).

    The memory taken is that of all tensors once, on the CPU.
    """

    def __init__(self) -> None:
        self.copies: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to copy ``tensors`` as they are in the order of the device's work: what is enqueued later changes
        the originals only. ``copies`` may be read after :meth:`wait`, until the next call."""
        local = {name: _local(tensor) for name, tensor in tensors.items()}
        self.copies = {name: self._buffer(name, tensor) for name, tensor in local.items()}
        cuda = False
        for name, tensor in local.items():
            self.copies[name].copy_(tensor, non_blocking=True)
            cuda = cuda or tensor.is_cuda
        self._copied = None
        if cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        """Wait, in any thread, until the copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        former = self.copies.get(name)
        if former is not None and former.shape == tensor.shape and former.dtype == tensor.dtype:
            return former
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda and tensor.numel() > 0)


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
