"""Copies of a run's tensors on the CPU, taken between two steps without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.parallel.local import local_part
from tokenformer.train.checkpoint.shared_memory import Layout, SharedMemory, lay_out
from tokenformer.train.checkpoint.tensors import WrittenShare, write_share


class Staging:
    """Copies of what each tensor holds on this rank, in page-locked memory that is used again for the next copy.

    A CUDA device copies on a stream of its own, beside the computation: only what changes the originals has to wait
    (:meth:`hold_updates`). The memory taken is that of all tensors once, on the CPU.

    Args:
        memory: where the copies lie, to be read by another process; by default memory of this process alone.
    """

    def __init__(self, memory: SharedMemory | None = None) -> None:
        self.copies: dict[str, Tensor] = {}
        self.layout = Layout({}, 0)
        self._memory = memory
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        self._held = True
        self._originals: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to copy ``tensors`` as they are in the order of the device's work. ``copies`` may be read after
        :meth:`wait`, until the next call; the originals may change after :meth:`hold_updates`.

        Raises:
            TokenFormerError: the memory cannot be had.
        """
        self.wait()
        local = {name: local_part(tensor.detach()) for name, tensor in tensors.items()}
        device = next((tensor.device for tensor in local.values() if tensor.is_cuda), None)
        self._make_room(local, pinned=device is not None)
        if device is None:
            self._copy(local)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            self._copy(local)
        self._copied = torch.cuda.Event(blocking=True)
        self._copied.record(self._stream)
        self._originals, self._held = local, False  # memory that is freed is used again on the other stream

    def hold_updates(self) -> None:
        """Let the device's work from here on begin only when the copies are complete; does not wait itself."""
        if not self._held and self._copied is not None:
            torch.cuda.current_stream(self._stream.device if self._stream else None).wait_event(self._copied)
            self._held = True

    def wait(self) -> None:
        """Wait, in any thread, until the copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()
        self._originals = {}

    def _copy(self, local: Mapping[str, Tensor]) -> None:
        for name, tensor in local.items():
            self.copies[name].copy_(tensor, non_blocking=True)

    def _make_room(self, local: Mapping[str, Tensor], *, pinned: bool) -> None:
        layout = lay_out(local)
        if layout == self.layout:
            return
        self.copies = {}
        try:
            if self._memory is None:
                self.copies = {
                    name: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda and t.numel() > 0)
                    for name, t in local.items()
                }
            else:
                self.copies = self._memory.tensors(layout)
                if pinned:
                    self._memory.lock_pages()
        except (OSError, RuntimeError) as error:
            raise TokenFormerError(
                f"checkpoint.asynchronous: {layout.size:,} bytes of main memory for a copy of weights and optimiser "
                f"state could not be had ({error}); with checkpoint.asynchronous=false none is needed"
            ) from error
        self.layout = layout


def write_staged(directory: Path, plan: bytes, descriptor: int, layout: Layout) -> WrittenShare:
    """What :func:`write_share` does, from the copies of another process in its shared memory."""
    return write_share(directory, plan, SharedMemory(descriptor).tensors(layout))
