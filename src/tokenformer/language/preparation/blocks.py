"""Blocks of about a million characters, the units in which a corpus is tokenized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from tokenformer.language.data_directory import SplitRule
from tokenformer.language.preparation.corpus import Content, Position, Reading
from tokenformer.language.preparation.splits import divide

BLOCK_CHARACTERS = 2**20

T = TypeVar("T")


class Piece(NamedTuple):
    """A text of a split, or a part of one; ``ends`` is true of its last part."""

    split: str
    text: str
    ends: bool


class State(NamedTuple):
    """Where a pass stood after a block: its position, what it had skipped and the UTF-8 bytes before it."""

    position: Position
    skipped: dict[str, int]
    utf8_bytes: int


class Block(NamedTuple):
    """Consecutive pieces, sorted by split (those of a split keep their order), and what they stand for.

    ``digests`` are of the documents that begin here, ``split_bytes`` the UTF-8 bytes by split. ``state`` is None
    where the block ends inside a document.
    """

    pieces: list[Piece]
    digests: bytes
    split_bytes: dict[str, int]
    state: State | None


def make_blocks(
    reading: Reading, utf8_bytes: int, rule: SplitRule, cut: Callable[[str], Iterable[str]]
) -> Iterator[Block]:
    """Cut what is left of a reading, before which ``utf8_bytes`` were read, into blocks.

    A document is one piece, or several where ``cut`` divides its text.
    """
    block = _OpenBlock()
    for content in reading:
        block.begin(content)
        parts = divide(content, utf8_bytes, rule)
        utf8_bytes += content.utf8_bytes
        for part, is_last_part in _with_last(parts):
            for text, ends in _with_last(cut(part.text)):
                block.add(Piece(part.split, text, ends))
                if block.characters >= BLOCK_CHARACTERS:
                    complete = ends and is_last_part
                    yield block.close(_state(reading, utf8_bytes) if complete else None)
                    block = _OpenBlock()
    if block.characters:
        yield block.close(_state(reading, utf8_bytes))


def whole(text: str) -> Iterable[str]:
    """``text`` uncut."""
    return (text,)


def _state(reading: Reading, utf8_bytes: int) -> State:
    return State(reading.position, dict(reading.skipped), utf8_bytes)


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last."""
    iterator = iter(items)
    current = next(iterator, None)
    while current is not None:
        following = next(iterator, None)
        yield current, following is None
        current = following


class _OpenBlock:
    def __init__(self) -> None:
        self.characters = 0
        self._pieces: list[Piece] = []
        self._digests: list[bytes] = []
        self._split_bytes: dict[str, int] = {}

    def begin(self, content: Content) -> None:
        self._digests.append(content.digest)

    def add(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self.characters += len(piece.text)
        size = len(piece.text.encode("utf-8"))
        self._split_bytes[piece.split] = self._split_bytes.get(piece.split, 0) + size

    def close(self, state: State | None) -> Block:
        self._pieces.sort(key=lambda piece: piece.split)
        return Block(self._pieces, b"".join(self._digests), self._split_bytes, state)
