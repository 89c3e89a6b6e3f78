"""Which text is trained on and which is held out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tokenformer.language.data_directory import SplitRule
from tokenformer.language.preparation.corpus import Content, Corpus, Position, Reading
from tokenformer.language.preparation.tokens import Body, Tokens


class Part(NamedTuple):
    """A document, or one side of a cut text, and the split it belongs to."""

    split: str
    body: Body


class Survey(NamedTuple):
    """The rule that fits a corpus, and, where all of it had to be read to find that, its UTF-8 bytes."""

    rule: SplitRule
    utf8_bytes: int | None


def survey(corpus: Corpus, fraction: float, on_text: Callable[[int], None]) -> Survey:
    """Choose how the texts of the first group are divided, reading no more than is needed for that.

    By content hash where that leaves documents on both sides; else the end of the text is held out. Nothing of
    it is, where another group is the validation split. ``on_text`` sees the UTF-8 bytes of each text read.

    Raises:
        TokenFormerError: a group without text, or a source that cannot be read.
    """
    apart = any(group.split == "validation" for group in corpus.groups)
    for number in range(1, len(corpus.groups)):
        _require_text(corpus, number)
    reading = Reading(corpus)
    documents = utf8_bytes = held_out = 0
    for content in reading:
        if content.split is not None:
            break
        documents += 1
        utf8_bytes += content.utf8_bytes
        held_out += is_held_out(content.digest, fraction)
        on_text(content.utf8_bytes)
        if apart:
            return Survey(SplitRule(method="separate"), None)
        if 0 < held_out < documents:
            return Survey(SplitRule(method="content_hash", validation_fraction=fraction), None)
    if not documents:
        raise corpus.without_text(0, reading.skipped)
    cut = max(1, utf8_bytes - max(1, round(utf8_bytes * fraction)))
    return Survey(SplitRule(method="tail", validation_fraction=fraction, cut=cut), utf8_bytes)


def _require_text(corpus: Corpus, group: int) -> None:
    reading = Reading(corpus, Position(group))
    content = next(iter(reading), None)
    if content is None or reading.position.group != group:
        raise corpus.without_text(group, reading.skipped)


def divide(content: Content, start: int, rule: SplitRule) -> list[Part]:
    """The splits of one text; ``start`` counts the UTF-8 bytes of all texts before it."""
    if content.split is not None:
        return [Part(content.split, content.body)]
    if rule.method == "tail":
        assert rule.cut is not None
        return _divide_at(content, start, rule.cut)
    held_out = rule.method == "content_hash" and is_held_out(content.digest, rule.validation_fraction or 0)
    return [Part("validation" if held_out else "train", content.body)]


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Whether the SHA-256 of a text, as a fraction of its range, lies below ``fraction``."""
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def _divide_at(content: Content, start: int, cut: int) -> list[Part]:
    if start + content.utf8_bytes <= cut:
        return [Part("train", content.body)]
    if start > 0 and (cut <= start or isinstance(content.body, Tokens)):
        return [Part("validation", content.body)]
    if isinstance(content.body, Tokens):  # which are not cut
        return [Part("train", content.body)]
    utf8 = content.body.encode("utf-8")
    position = _boundary(utf8, cut - start, first=start == 0)
    sides = (("train", utf8[:position]), ("validation", utf8[position:]))
    return [Part(split, side.decode("utf-8")) for split, side in sides if side]


def _boundary(content: bytes, position: int, *, first: bool) -> int:
    """Where to cut near ``position``: at the start of its line, else of the next, else of a character.

    Something is left before the cut of the ``first`` text.
    """
    before = content.rfind(b"\n", 0, position) + 1
    if before:
        return before
    after = content.find(b"\n", position) + 1
    if 0 < after < len(content):
        return after
    while position and _inside_character(content, position):
        position -= 1
    if first and position == 0:
        position = 1
        while _inside_character(content, position):
            position += 1
    return position


def _inside_character(content: bytes, position: int) -> bool:
    return position < len(content) and content[position] & 0xC0 == 0x80
