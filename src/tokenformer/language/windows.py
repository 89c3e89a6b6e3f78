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


class ScoredWindows(Protocol):
    """Windows of T tokens that hold each of ``num_targets`` targets exactly once."""

    num_targets: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Window: ...

    def empty(self) -> Window:
        """A window without targets."""
        ...


class ValidationWindows:
    """Windows that hold every token of a stream but the first exactly once as a target, in order.

    With a ``stride`` S below T windows begin every S tokens, and all but the first one count only their last S
    targets, which then have at least T - S tokens before them. What a window has too many is filled up: inputs with the
    id 0, targets with ``IGNORED``. ``max_targets`` ends the stream after so many targets; ``num_targets`` says how many
    there are.

    Raises:
        TokenFormerError: the stream holds fewer than two tokens, ``max_targets`` is below 1, or ``stride`` is not
            between 1 and T.
    """

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        max_targets: int | None = None,
        stride: int | None = None,
    ) -> None:
        if stream.num_tokens < 2:
            raise TokenFormerError(f"{stream.prefix}: holds {stream.num_tokens} tokens, expected at least 2")
        if max_targets is not None and max_targets < 1:
            raise TokenFormerError(f"max_tokens: found {max_targets}, expected at least 1")
        available = stream.num_tokens - 1
        self.num_targets = available if max_targets is None else min(max_targets, available)
        self._stream = stream
        self._length = sequence_length
        self._stride = _check_stride(stride, sequence_length)

    def __len__(self) -> int:
        return int(_count_windows(self.num_targets, self._length, self._stride))

    def empty(self) -> Window:
        """A window without targets."""
        return _empty(self._length)

    def __getitem__(self, index: int) -> Window:
        """Window ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self._stride
        stop = min(start + self._length, self.num_targets)
        return _fill(self._stream.tokens(start, stop + 1), index, self._length, self._stride)


class DocumentWindows:
    """Windows over each document by itself, the shortest first: every token of its text is a target exactly once.

    A document begins after the end-of-document id, as ``loglikelihood_rolling`` of lm-evaluation-harness and the
    Pile's evaluation have it; its own end is no target. Windows and ``stride`` are those of
    :class:`ValidationWindows`.

    Raises:
        TokenFormerError: the stream holds no text, or ``stride`` is not between 1 and T.
    """

    def __init__(
        self, stream: TokenStream, sequence_length: int, eos_token_id: int, stride: int | None = None
    ) -> None:
        self._stream = stream
        self._length = sequence_length
        self._end = eos_token_id
        self._stride = _check_stride(stride, sequence_length)
        starts = stream.document_starts()
        sizes = np.diff(starts)
        ends_itself = [
            size > 0 and stream.tokens(stop - 1, stop)[0] == eos_token_id
            for stop, size in zip(starts[1:], sizes, strict=True)
        ]
        self._starts, sizes = starts[:-1], sizes - np.array(ends_itself, np.int64)
        self._order = np.argsort(sizes, kind="stable")[np.count_nonzero(sizes == 0) :]
        self._sizes = sizes[self._order]
        self.num_targets = int(self._sizes.sum())
        if not self.num_targets:
            raise TokenFormerError(f"{stream.prefix}: holds no text, expected at least one token of it")
        self._ends = np.cumsum(_count_windows(self._sizes, self._length, self._stride))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def empty(self) -> Window:
        """A window without targets."""
        return _empty(self._length)

    def __getitem__(self, index: int) -> Window:
        """Window ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        place = int(np.searchsorted(self._ends, index, side="right"))
        inner = index - (int(self._ends[place - 1]) if place else 0)
        begin, size = int(self._starts[self._order[place]]), int(self._sizes[place])
        start = inner * self._stride
        stop = min(start + self._length, size)
        tokens = self._stream.tokens(begin + max(0, start - 1), begin + stop)
        if start == 0:
            tokens = np.concatenate((np.array([self._end], tokens.dtype), tokens))
        return _fill(tokens, inner, self._length, self._stride)


def _check_stride(stride: int | None, length: int) -> int:
    if stride is not None and not 1 <= stride <= length:
        raise TokenFormerError(f"stride: found {stride}, expected 1 to {length}, the tokens of a window")
    return stride or length


def _count_windows(targets: np.ndarray | int, length: int, stride: int) -> np.ndarray:
    """Windows of texts of so many targets: the first holds up to ``length``, each other one ``stride`` new ones."""
    beyond = np.maximum(0, np.asarray(targets) - length)
    return 1 + -(-beyond // stride)


def _empty(length: int) -> Window:
    return Window(np.zeros(length, np.int64), np.full(length, IGNORED, np.int64))


def _fill(tokens: np.ndarray, index: int, length: int, stride: int) -> Window:
    """Window ``index`` of a text, over ``tokens``; those that a former window scored only give context."""
    window = _empty(length)
    known = length - stride if index else 0
    window.inputs[: len(tokens) - 1] = tokens[:-1]
    window.targets[known : len(tokens) - 1] = tokens[1 + known :]
    return window
