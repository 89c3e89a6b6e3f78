"""Text of ids that arrive one at a time, never half a character."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable


class TextStream(ABC):
    """Decodes one id after another."""

    @abstractmethod
    def add(self, id: int) -> str:
        """The text that ``id`` completes; empty while a character is incomplete."""

    @abstractmethod
    def finish(self) -> str:
        """What is left at the end: U+FFFD where a character stayed incomplete."""


class ByteLevelStream(TextStream):
    """For tokens that are bytes: ``bytes_of`` gives those of an id."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> str:
        return self._decoder.decode(self._bytes_of(int(id)))

    def finish(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class GenericStream(TextStream):
    """Decodes a short tail again with each id, since a token's text can depend on the one before it."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._pending: list[int] = []

    def add(self, id: int) -> str:
        self._pending.append(int(id))
        text = self._pending_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        text = self._pending_text()
        self._context, self._pending = [], []
        return text

    def _pending_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]
