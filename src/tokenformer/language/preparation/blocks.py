"""Blocks of about a million characters, the units in which a corpus is tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import NamedTuple, TypeVar

from tokenformer.language.data_directory import SplitRule
from tokenformer.language.preparation.corpus import Content, Position, Reading
from tokenformer.language.preparation.splits import divide
from tokenformer.language.preparation.tokens import Body, utf8_size

BLOCK_CHARACTERS = 2**20

T = TypeVar("T")


class State(NamedTuple):
    """Where a pass stood after a block: its position, what it had skipped and the UTF-8 bytes before it."""

    position: Position
    skipped: dict[str, int]
    utf8_bytes: int


class Block(NamedTuple):
    """Consecutive bodies of documents, or pieces of them, sorted by split (those of a split keep their order).

    ``ends`` is true of each that ends its document. ``digests`` are of the documents that begin here,
    ``split_bytes`` the UTF-8 bytes by split. ``state`` is None where the block ends inside a document.
    """

    bodies: list[Body]
    ends: list[bool]
    splits: list[str]
    digests: bytes
    split_bytes: dict[str, int]
    state: State | None

    def without_bodies(self) -> Block:
        """All that is needed beside the tokens."""
        return self._replace(bodies=[])


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
            bodies: Iterable[Body] = cut(part.body) if isinstance(part.body, str) else (part.body,)
            for body, ends in _with_last(bodies):
                block.add(body, ends, part.split)
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
        self._pieces: list[tuple[Body, bool, str]] = []
        self._digests: list[bytes] = []
        self._split_bytes: Counter[str] = Counter()

    def begin(self, content: Content) -> None:
        self._digests.append(content.digest)

    def add(self, body: Body, ends: bool, split: str) -> None:
        self._pieces.append((body, ends, split))
        self.characters += len(body)
        self._split_bytes[split] += utf8_size(body)

    def close(self, state: State | None) -> Block:
        bodies, ends, splits = zip(*sorted(self._pieces, key=itemgetter(2)), strict=True)
        digests = b"".join(self._digests)
        return Block(list(bodies), list(ends), list(splits), digests, dict(self._split_bytes), state)
