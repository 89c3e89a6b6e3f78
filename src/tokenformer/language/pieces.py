"""Very long texts in pieces that a tokenizer can take one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

LONG = 2**20
"""Characters from which on a text is cut at all."""

_PIECE = 2**18
_CUT = re.compile(r"(?<=\S)(?:\n(?=\S)|(?= \S))")


def pieces(text: str) -> Iterator[str]:
    """``text`` whole where it is short, else in pieces of about 262,144 characters that add up to it.

    A cut comes before a single space, or after a single newline, between two characters that are not
    whitespace: there the patterns of byte-level tokenizers (GPT-2's and its descendants) begin a new word in
    any case, so the words are those of the whole text.
    """
    start = 0
    if len(text) > LONG:
        while (cut := _CUT.search(text, start + _PIECE)) is not None:
            yield text[start : cut.end()]
            start = cut.end()
    yield text[start:]


def groups(texts: Iterable[tuple[int, str]], characters: int) -> Iterator[list[tuple[int, str]]]:
    """Consecutive numbered texts of at least ``characters`` together; the last group holds the rest."""
    group: list[tuple[int, str]] = []
    size = 0
    for number, text in texts:
        group.append((number, text))
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group
