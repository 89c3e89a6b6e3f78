"""Very long texts in pieces that a tokenizer can take one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, normalizers

LONG = 2**20
"""Characters from which on a text is cut at all."""

_PIECE = 2**18
_CHARACTERS = "aZ1.,'\"-(\u00e9\u4e2d\u0301\U0001f600"
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


def words_begin_at_spaces(backend: Tokenizer) -> bool:
    """Whether a text can always be cut before a single space between two other characters, and its parts be encoded by
    themselves: the tokenizer makes words first, begins one there, and nothing before or after that joins two words.
    """
    words = backend.pre_tokenizer
    if words is None or not isinstance(backend.normalizer, normalizers.NFC | None):
        return False
    added = backend.get_added_tokens_decoder().values()
    if any(token.rstrip or re.search(r"\s", token.content.strip()) for token in added):
        return False
    texts = (f"{left} {right}" for left in _CHARACTERS for right in _CHARACTERS)
    return all(1 in (start for _, (start, _) in words.pre_tokenize_str(text)) for text in texts)


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
