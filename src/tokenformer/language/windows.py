"""Windows of a token stream: for training one every T tokens, for validation each target once."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from tokenformer.errors import TokenFormerError
from tokenformer.language.token_stream import TokenStream

IGNORED = -100
"""Target that no loss counts."""

PADDING_DOCUMENT = -1
"""Document of a position that holds nothing."""


class WindowSource(Protocol):
    """A finite list of training windows of ``sequence_length`` positions."""

    stream: TokenStream
    sequence_length: int
    has_documents: bool

    def __len__(self) -> int: ...

    def read(self, index: int, inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None) -> None:
        """Fill the rows ``inputs``, ``targets`` and, where the source ``has_documents``, ``documents`` [T] int64 with
        window ``index``."""
        ...


class StreamWindows:
    """Window w: T tokens from token w T of the stream on, and the token after each; documents run through.

    Raises:
        TokenFormerError: the stream is shorter than one window.
    """

    has_documents = False

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        if stream.num_tokens < sequence_length + 1:
            raise TokenFormerError(
                f"{stream.prefix}: holds {stream.num_tokens} tokens, expected at least {sequence_length + 1} "
                f"(sequence_length {sequence_length} + 1)"
            )
        self.stream = stream
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return (self.stream.num_tokens - 1) // self.sequence_length

    def read(self, index: int, inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None) -> None:
        """See :class:`WindowSource`."""
        start = index * self.sequence_length
        tokens = self.stream.tokens(start, start + self.sequence_length + 1)
        inputs[:] = tokens[:-1]
        targets[:] = tokens[1:]


class Window(NamedTuple):
    """``inputs`` [T] int64, and ``targets`` [T] int64: the token after each, or ``IGNORED``."""

    inputs: np.ndarray
    targets: np.ndarray


class ValidationWindows:
    """Windows that hold every token of a stream but the first exactly once as a target, in order.

    The last one is filled up: its inputs with the id 0, its targets with ``IGNORED``. ``max_targets`` ends
    the stream after so many targets; ``num_targets`` says how many there are.

    Raises:
        TokenFormerError: the stream holds fewer than two tokens, or ``max_targets`` is below 1.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, max_targets: int | None = None) -> None:
        if stream.num_tokens < 2:
            raise TokenFormerError(f"{stream.prefix}: holds {stream.num_tokens} tokens, expected at least 2")
        if max_targets is not None and max_targets < 1:
            raise TokenFormerError(f"max_tokens: found {max_targets}, expected at least 1")
        available = stream.num_tokens - 1
        self.num_targets = available if max_targets is None else min(max_targets, available)
        self._stream = stream
        self._length = sequence_length

    def __len__(self) -> int:
        return -(-self.num_targets // self._length)

    def empty(self) -> Window:
        """A window without targets."""
        return Window(np.zeros(self._length, np.int64), np.full(self._length, IGNORED, np.int64))

    def __getitem__(self, index: int) -> Window:
        """Window ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self._length
        stop = min(start + self._length, self.num_targets)
        tokens = self._stream.tokens(start, stop + 1).astype(np.int64)
        window = self.empty()
        window.inputs[: stop - start] = tokens[:-1]
        window.targets[: stop - start] = tokens[1:]
        return window
