"""Generation in memory that stays where it is: on a GPU one token is one CUDA graph, sampling included.

The host only launches: tokens stay on the device, and come to the host a few steps late, in chunks. Axis letters: b
prompts, v vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.kernels import has_triton
from tokenformer.generation.sampling import check_finite, draw, filter_logits, uniforms

if TYPE_CHECKING:
    from tokenformer.ops.greedy import GreedyChoice

_LARGEST_GREEDY_BATCH = 64  # the last of its kernels takes all rows in one program
_CHUNKS_IN_FLIGHT = 2
_LONGEST_CHUNK = 16
STEPS_AT_ONCE = 4
"""Steps of one graph: between two graphs a GPU stands still for a moment."""

Step = Callable[[Tensor, Any], Tensor]
"""tokens [b, 1] and a static state, which it changes, to logits [b, v] of any dtype."""


class StaticDecoder:
    """The next tokens of b prompts, step after step on the device.

    Args:
        state: the model's static state.
        step: one call of the model.
        sampling: how tokens are chosen; the seed comes with :meth:`start`.
        vocab_size: ids from here on are never chosen.
        length: the most tokens of a prompt and its continuation, padding included, and room for ``STEPS_AT_ONCE``
            more, since steps are taken together.
        device: of the model.
    """

    def __init__(
        self,
        state: Any,
        step: Step,
        sampling: SamplingConfig,
        vocab_size: int,
        *,
        length: int,
        device: torch.device,
    ) -> None:
        self.state = state
        self.batch_size, self.length = state.batch_size, length
        self._sampling, self._vocab_size, self.step = sampling, vocab_size, step
        self._tokens = torch.zeros(self.batch_size, 1, dtype=torch.int64, device=device)
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        # a row for each step: the tokens, and whether the logits they were chosen from were finite
        self._log = torch.zeros(length, self.batch_size + 1, dtype=torch.int64, device=device)
        self._uniforms = torch.zeros(length, self.batch_size, device=device)
        self._greedy = self._greedy_choice() if sampling.temperature == 0 else None
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._capture()

    def start(self, state: Any, logits: Tensor, seed: int) -> None:
        """Go on from ``state``, the first tokens chosen from ``logits`` [b, v]; prompt i draws with ``seed + i``."""
        self.state.load(state)
        self._count.zero_()
        if self._sampling.temperature > 0:
            drawn = [uniforms(seed + row, self.length) for row in range(self.batch_size)]
            self._uniforms.copy_(torch.stack(drawn, dim=1))
        self._choose(logits)

    def advance(self) -> None:
        """Choose the next ``STEPS_AT_ONCE`` tokens of every prompt."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._steps()

    def logits_after(self, tokens: Tensor) -> Tensor:
        """Logits [b, v] after ``tokens`` [b, 1], from where the state is."""
        return self.step(tokens, self.state)

    def chosen(self, first: int, last: int) -> Tensor:
        """Tokens [last - first, b] of these steps, and in one more column whether all was finite."""
        return self._log[first:last]

    def _one(self) -> None:
        self._choose(self.step(self._tokens, self.state))

    def _steps(self) -> None:
        for _ in range(STEPS_AT_ONCE):
            self._one()

    def _choose(self, logits: Tensor) -> None:
        if self._greedy is not None:
            self._greedy(logits, self._tokens, self._log, self._count)
            return
        finite = torch.isfinite(logits).all()
        kept = filter_logits(logits, self._sampling, vocab_size=self._vocab_size)
        if self._sampling.temperature == 0:
            tokens = kept.argmax(dim=-1)
        else:
            tokens = draw(kept, self._uniforms.index_select(0, self._count)[0])
        self._log.index_copy_(0, self._count, torch.cat((tokens, finite[None].to(tokens.dtype)))[None])
        self._tokens.copy_(tokens[:, None].clamp_(min=0))  # where logits are NaN, no token is drawn
        self._count.add_(1)

    def _greedy_choice(self) -> GreedyChoice | None:
        """The kernels that take the likeliest tokens, where there are any."""
        device = self._tokens.device
        if device.type != "cuda" or self.batch_size > _LARGEST_GREEDY_BATCH or not has_triton():
            return None
        from tokenformer.ops.greedy import GreedyChoice

        return GreedyChoice(self.batch_size, self._vocab_size, device)

    def _capture(self) -> None:
        """Record the steps; what the calls before it have changed, :meth:`start` sets anew."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries allocate and tune in their first calls
                self._rewind()
                self._one()
        torch.cuda.current_stream().wait_stream(stream)
        self._rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._steps()
        self._graph = graph

    def _rewind(self) -> None:
        self.state.rewind()
        self._count.zero_()


class LaggingReader:
    """Tokens of a :class:`StaticDecoder` on the host, while the device is a chunk ahead.

    Args:
        decoder: started.
        steps: how many steps there will be at most.
    """

    def __init__(self, decoder: StaticDecoder, steps: int) -> None:
        self._decoder, self._steps = decoder, steps
        self._chosen = 1  # the first when the decoder starts
        self._asked = 0  # of those chosen, how many are on the way to the host
        self._chunk = STEPS_AT_ONCE
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._known: list[list[int]] = []

    def tokens(self, step: int, rows: Sequence[int]) -> list[int]:
        """Those that step number ``step`` (from 0) has chosen for the prompts ``rows``."""
        while step >= len(self._known):
            while len(self._pending) < _CHUNKS_IN_FLIGHT and self._asked < self._steps:
                self._launch()
            chunk, arrived = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            self._known.extend(chunk.tolist())
        *tokens, finite = self._known[step]
        check_finite(bool(finite))
        return [tokens[row] for row in rows]

    def _launch(self) -> None:
        last = 1
        if self._asked:
            last = min(self._asked + self._chunk, self._steps)
            self._chunk = min(2 * self._chunk, _LONGEST_CHUNK)
        while self._chosen < last:
            self._decoder.advance()
            self._chosen += STEPS_AT_ONCE
        chosen = self._decoder.chosen(self._asked, last)
        if chosen.is_cuda:
            chunk = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            chunk.copy_(chosen, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._pending.append((chunk, arrived))
        else:
            self._pending.append((chosen.clone(), None))
        self._asked = last
