"""Whole documents packed into windows: attention and positions begin anew with each, and none is cut that fits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from tokenformer.errors import TokenFormerError
from tokenformer.language.token_stream import TokenStream
from tokenformer.language.windows import IGNORED, PADDING_DOCUMENT


class Pattern(NamedTuple):
    """``windows`` windows that each hold ``copies`` pieces of every ``length`` in ``parts`` (length, copies)."""

    windows: int
    parts: tuple[tuple[int, int], ...]


def pack_lengths(counts: np.ndarray, capacity: int) -> list[Pattern]:
    """Best-fit decreasing bin packing of ``counts[n]`` pieces of each length n, from 1 to ``capacity``.

    Pieces of a length are packed together, into the fullest windows where they fit, so that the work grows with the
    number of lengths and not of pieces (histogram packing: Krell et al., arXiv 2107.02027).
    """
    open_patterns: dict[int, list[Pattern]] = {}  # by the room that is left
    rooms = 0  # bit r is set where there is a pattern with room r
    for length in np.flatnonzero(counts[: capacity + 1])[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                pattern = open_patterns[room].pop()
                if not open_patterns[room]:
                    rooms &= ~(1 << room)
            else:
                room, pattern = capacity, Pattern(-(-left // (capacity // length)), ())
            copies = min(room // length, max(left // pattern.windows, 1))
            filled = min(pattern.windows, left // copies)
            if filled < pattern.windows and pattern.parts:
                open_patterns.setdefault(room, []).append(pattern._replace(windows=pattern.windows - filled))
                rooms |= 1 << room
            room -= copies * length
            full = Pattern(filled, (*pattern.parts, (length, copies)))
            open_patterns.setdefault(room, []).append(full)
            rooms |= 1 << room
            left -= filled * copies
    return [pattern for room in sorted(open_patterns) for pattern in open_patterns[room]]


class DocumentWindows:
    """Windows of whole documents.

    A document of n tokens takes n - 1 positions: each of its tokens but the last is an input, each but the first a
    target; so no target lies in another document. Where that is more than T, it is cut into pieces of T positions
    and a rest, each of which counts as a document. Pieces are packed by :func:`pack_lengths`; those of one length are
    taken in the order of the stream, whole documents first. What is left of a window is padding. Documents of fewer
    than two tokens are left out.

    The plan is computed from the document lengths alone and kept in memory, 12 bytes a piece.

    Raises:
        TokenFormerError: no document has two tokens.
    """

    has_documents = True

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self.stream = stream
        self.sequence_length = sequence_length
        if not len(self._plan.lengths):
            raise TokenFormerError(
                f"{stream.prefix}: holds no document of two tokens; nothing can be predicted"
            )

    def __len__(self) -> int:
        return len(self._plan.first_pieces) - 1

    @property
    def fill(self) -> float:
        """Positions that hold a token, as a part of all."""
        return int(self._plan.lengths.sum(dtype=np.int64)) / (len(self) * self.sequence_length)

    def pieces(self, index: int) -> Iterator[tuple[int, int]]:
        """First token and number of positions of each piece of window ``index``."""
        first, last = self._plan.first_pieces[index : index + 2]
        return zip(
            self._plan.starts[first:last].tolist(), self._plan.lengths[first:last].tolist(), strict=True
        )

    def read(self, index: int, inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None) -> None:
        """See :class:`~tokenformer.language.windows.WindowSource`; ``documents`` counts the pieces from 0."""
        assert documents is not None
        begin = 0
        for document, (start, length) in enumerate(self.pieces(index)):
            tokens = self.stream.tokens(start, start + length + 1)
            end = begin + length
            inputs[begin:end] = tokens[:-1]
            targets[begin:end] = tokens[1:]
            documents[begin:end] = document
            begin = end
        inputs[begin:] = 0
        targets[begin:] = IGNORED
        documents[begin:] = PADDING_DOCUMENT

    @cached_property
    def _plan(self) -> _Plan:
        starts, lengths = _cut(self.stream.document_starts(), self.sequence_length)
        return _arrange(starts, lengths, self.sequence_length)

    def __getstate__(self) -> dict[str, Any]:
        """Another process makes its own plan, sooner than this one could be sent."""
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}


class _Plan(NamedTuple):
    """``starts`` [p] int64 and ``lengths`` [p] int32 of all pieces, window after window; window w has those from
    ``first_pieces[w]`` (int64) on."""

    starts: np.ndarray
    lengths: np.ndarray
    first_pieces: np.ndarray


def _cut(document_starts: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """First token (int64) and positions (int32) of every piece: documents that fit, then the pieces of the others."""
    positions = np.diff(document_starts)
    positions -= 1
    fits = (positions > 0) & (positions <= capacity)
    whole_starts, whole_lengths = document_starts[:-1][fits], positions[fits].astype(np.int32)
    long = np.flatnonzero(positions > capacity)
    starts, positions = document_starts[long], positions[long]
    pieces = -(-positions // capacity)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # within its document
    starts = np.repeat(starts, pieces) + number * capacity
    lengths = np.minimum(np.repeat(positions, pieces) - number * capacity, capacity).astype(np.int32)
    return np.concatenate((whole_starts, starts)), np.concatenate((whole_lengths, lengths))


def _arrange(starts: np.ndarray, lengths: np.ndarray, capacity: int) -> _Plan:
    counts = np.bincount(lengths, minlength=capacity + 1)
    patterns = pack_lengths(counts, capacity)
    by_length = np.argsort(lengths.astype(np.uint16) if capacity < 2**16 else lengths, kind="stable")
    pool = starts[by_length]
    nexts = np.concatenate(
        ([0], np.cumsum(counts)[:-1])
    )  # the first piece in the pool of each length not yet placed
    placed_starts, placed_lengths = np.empty_like(pool), np.empty(len(pool), np.int32)
    sizes = []
    begin = 0
    for windows, parts in patterns:
        per_window = sum(copies for _, copies in parts)
        end = begin + windows * per_window
        block_starts = placed_starts[begin:end].reshape(windows, per_window)
        block_lengths = placed_lengths[begin:end].reshape(windows, per_window)
        column = 0
        for length, copies in parts:
            first, last = nexts[length], nexts[length] + windows * copies
            block_starts[:, column : column + copies] = pool[first:last].reshape(windows, copies)
            block_lengths[:, column : column + copies] = length
            nexts[length] = last
            column += copies
        begin = end
        sizes.append(per_window)
    pieces = np.repeat(np.array(sizes, np.int64), [pattern.windows for pattern in patterns])
    return _Plan(placed_starts, placed_lengths, np.concatenate(([0], np.cumsum(pieces))))
