"""Memory that a process shares with one it has started: anonymous, so that it ends with them, however they end."""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 256
"""Bytes: as allocators of devices have it."""
_REGISTER_PORTABLE = 1  # of CUDA's cudaHostRegister


class Place(NamedTuple):
    """Where a tensor lies: ``offset`` in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Layout(NamedTuple):
    """Tensors one after the other in ``size`` bytes."""

    places: dict[str, Place]
    size: int


def lay_out(tensors: Mapping[str, Tensor]) -> Layout:
    """A place for each of ``tensors``."""
    places, offset = {}, 0
    for name, tensor in tensors.items():
        places[name] = Place(offset, tuple(tensor.shape), tensor.dtype)
        size = tensor.numel() * tensor.element_size()
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    return Layout(places, offset)


class SharedMemory:
    """Memory known by a file descriptor, which a child process can be given; no limit of ``/dev/shm`` applies.

    Args:
        descriptor: of memory that another process made; by default it is made here, empty.

    Raises:
        OSError: the system has no such memory (it is Linux's).
    """

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            if not hasattr(os, "memfd_create"):
                raise OSError("this system has no anonymous shared memory")
            descriptor = os.memfd_create("tokenformer-checkpoint")
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None
        self._locked: weakref.finalize[..., SharedMemory] | None = None

    def tensors(self, layout: Layout) -> dict[str, Tensor]:
        """The tensors of ``layout``, in this memory; those of a former layout must not be used any more where this
        one is larger.

        Raises:
            OSError: there is not so much memory.
        """
        found = os.fstat(self.descriptor).st_size
        if found < layout.size:
            os.ftruncate(self.descriptor, layout.size)
            found = layout.size
        if found and (self._map is None or len(self._map) != found):
            self._unlock()
            self._map = mmap.mmap(self.descriptor, found)
        return {name: self._tensor(place) for name, place in layout.places.items()}

    def lock_pages(self) -> None:
        """Take the memory at once and keep it in place for the devices, so that they copy to it by themselves.

        Where the system does not allow that, copies wait for the device.
        """
        if self._map is None or self._locked is not None:
            return
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        whole[:: mmap.PAGESIZE] = 0  # page by page, in several threads
        runtime = torch.cuda.cudart()
        result = runtime.cudaHostRegister(whole.data_ptr(), whole.numel(), _REGISTER_PORTABLE)
        if int(result) == 0:
            # also where nobody closes this: what came to lie at these addresses later would pass for page-locked, and
            # devices would copy from the pages that were here
            self._locked = weakref.finalize(self, _unregister, whole)
            self._locked.atexit = False  # the process's end does the same
            return
        with suppress(RuntimeError):  # CUDA reports the error once more, to whoever comes next
            torch.zeros(1, device="cuda")

    def close(self) -> None:
        """Give the memory back, once the tensors in it are gone."""
        self._unlock()
        self._map = None
        with suppress(OSError):
            os.close(self.descriptor)

    def _unlock(self) -> None:
        if self._locked is not None:
            self._locked()
            self._locked = None

    def _tensor(self, place: Place) -> Tensor:
        count = math.prod(place.shape)
        if not count:
            return torch.empty(place.shape, dtype=place.dtype)
        assert self._map is not None
        # with a storage of its own: torch.save writes whole storages
        return torch.frombuffer(self._map, dtype=place.dtype, count=count, offset=place.offset).view(
            place.shape
        )


def _unregister(whole: Tensor) -> None:
    """Of memory that is still mapped, as ``whole`` keeps it."""
    torch.cuda.cudart().cudaHostUnregister(whole.data_ptr())
