"""Forward and backward of a step as CUDA graphs: launched whole, where one launch a kernel leaves the device waiting.

A graph repeats what it recorded on the same memory, so a step's batches are copied into the place of the recorded
one, and gradients always lie where the recording put them. The first pass of a step writes them, further ones add to
them: two graphs. What follows in a step (clipping, the update) is launched as ever, while the graph still runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

WARM_UP = 2
"""Steps with batches of one form before they are recorded: by then everything is compiled and chosen."""

Pass = Callable[[Any, Tensor, Tensor], None]
"""Forward and backward of a batch on the device, which adds to the sums of nats and of targets, and to gradients."""
Form = tuple[tuple[torch.Size, torch.dtype] | None, ...]


class Recording(Protocol):
    """A ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None: ...

    def pool(self) -> Any: ...


def record(work: Callable[[], None], pool: Any) -> Recording:
    """What ``work`` launches, as a graph; memory comes from ``pool`` (None: one of its own)."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads (reading data, writing checkpoints) may use the device meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph


class CudaGraphs:
    """Runs the passes of steps whose batches all have one form, the same as in the steps before.

    Args:
        parameters: those that get gradients.
        device: a CUDA device.
        record: makes a graph.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        record: Callable[[Callable[[], None], Any], Recording] = record,
    ) -> None:
        self._record_graph = record
        self._parameters = parameters
        self._device = device
        self._works = True
        self._form: Form | None = None
        self._steps = 0  # with this form
        self._forget()
        self.peak_memory = 0
        """Bytes that were in use at most while recording; replays take none."""

    def run(self, batches: Sequence[Any], run_pass: Pass) -> tuple[Tensor, Tensor] | None:
        """Nats and targets of a step, gradients in place; None where its passes are to be run one by one.

        Args:
            batches: NamedTuples of CPU tensors (or None); gradients of parameters are None.
            run_pass: what is recorded, the same every time. It must not wait for the device.
        """
        if not self._works or not self._is_due(batches):
            return None
        if self._first is None and not self._recorded(batches[0], run_pass):
            return None
        if len(batches) > 1 and self._further is None and not self._recorded(batches[0], run_pass):
            return None
        for index, batch in enumerate(batches):
            self._fill(batch)
            graph = self._first if index == 0 else self._further
            assert graph is not None
            graph.replay()
        self._attach_gradients()
        return self._nats, self._targets

    def _is_due(self, batches: Sequence[Any]) -> bool:
        forms = {form_of(batch) for batch in batches}
        form = forms.pop()
        if forms:
            return False
        if form != self._form:
            self._forget()
            self._form, self._steps = form, 0
        self._steps += 1
        return self._steps > WARM_UP

    def _forget(self) -> None:
        """Let go of the graphs and their memory."""
        self._first: Recording | None = None
        self._further: Recording | None = None
        self._gradients: list[Tensor | None] = []
        self._batch: Any = None

    def _recorded(self, batch: Any, run_pass: Pass) -> bool:
        try:
            self._record(batch, run_pass)
        except RuntimeError as error:
            self._works = False
            self._forget()
            for parameter in self._parameters:
                parameter.grad = None
            warnings.warn(
                f"this step cannot be recorded as a CUDA graph and runs without: {error}", stacklevel=2
            )
        return self._works

    def _record(self, batch: Any, run_pass: Pass) -> None:
        """The first pass of a step, or a further one where that is recorded already."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._first is None:
            self._batch = type(batch)(*(None if x is None else x.to(self._device, copy=True) for x in batch))
            self._first = self._record_graph(partial(self._first_pass, run_pass), None)
            self._gradients = [parameter.grad for parameter in self._parameters]
        else:
            self._further = self._record_graph(partial(self._further_pass, run_pass), self._first.pool())
        if self._device.type == "cuda":
            self.peak_memory = max(self.peak_memory, torch.cuda.max_memory_allocated(self._device))
        for parameter in self._parameters:
            parameter.grad = None

    def _first_pass(self, run_pass: Pass) -> None:
        self._nats, self._targets = (torch.zeros((), device=self._device) for _ in range(2))
        run_pass(self._batch, self._nats, self._targets)

    def _further_pass(self, run_pass: Pass) -> None:
        self._attach_gradients()
        run_pass(self._batch, self._nats, self._targets)

    def _attach_gradients(self) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _fill(self, batch: Any) -> None:
        for place, x in zip(self._batch, batch, strict=True):
            if x is not None:
                place.copy_(x.pin_memory() if place.device.type == "cuda" else x, non_blocking=True)


def form_of(batch: Any) -> Form:
    """Shape and dtype of each tensor of a NamedTuple."""
    return tuple(None if x is None else (x.shape, x.dtype) for x in batch)
