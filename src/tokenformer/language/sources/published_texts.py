"""Corpora that were published as one text: bytes of it, and its articles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from tokenformer.errors import TokenFormerError
from tokenformer.language.sources.compression import explain_damage, open_bytes
from tokenformer.language.sources.records import Document, Faults
from tokenformer.language.sources.text_files import decode

_BLOCK = 1 << 20
_LONGEST_CHARACTER = 4

_BLANK = " \n"
_HEADING = re.compile(r" = (?!= ).+ = \n?")


def read_range(path: Path, start: int, stop: int, total: int, faults: Faults) -> Iterator[Document]:
    """Bytes ``start`` to ``stop`` of a file of ``total`` bytes, packed or not, as one document.

    A cut inside a UTF-8 character moves to where that character begins.

    Raises:
        TokenFormerError: a file of another size.
    """
    before = max(0, start - _LONGEST_CHARACTER)
    with explain_damage(path), open_bytes(path) as file:
        skipped = _skip(file, before)
        content = file.read(stop + 1 - before)
    _check_size(skipped + len(content), min(stop + 1, total), stop == total, total, str(path))
    with faults:
        yield Document(_cut(content, start - before, stop - before, str(path), before), str(path))


def cut_texts(
    texts: Iterable[Document], start: int, stop: int, total: int, faults: Faults
) -> Iterator[Document]:
    """As :func:`read_range`, of each of the texts."""
    for text, name, *_ in texts:
        content = text.encode("utf-8")
        _check_size(len(content), total, True, total, name)
        with faults:
            yield Document(_cut(content, start, stop, name, 0), name)


def read_lines(path: Path, faults: Faults) -> Iterator[Document]:
    """The lines of a text, each with its ``\\n``."""
    offset = 0
    with explain_damage(path), open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            with faults:
                yield Document(decode(line, place, offset), place)
            offset += len(line)


def articles(lines: Iterable[Document]) -> Iterator[Document]:
    """Articles of WikiText: each begins at a level-1 heading, `` = Title = `` between blank lines.

    They add up to the lines. A blank line may lack its `` \\n``, as on the hub. An article has the name of its
    first line.
    """
    article: list[str] = []
    name, has_text = "", False
    previous = _BLANK
    waiting: Document | None = None  # a line that is a heading if a blank one follows
    for text, place, *_ in lines:
        line = text if text.endswith("\n") else (text or " ") + "\n"
        if waiting is not None:
            if not line.strip() and has_text:
                yield Document("".join(article), name)
                article, name = [], ""
            article.append(waiting.text)
            name, has_text, previous, waiting = name or waiting.name, True, waiting.text, None
        if not previous.strip() and _HEADING.fullmatch(line):
            waiting = Document(line, place)
            continue
        article.append(line)
        name, has_text, previous = name or place, has_text or bool(line.strip()), line
    if waiting is not None:
        article.append(waiting.text)
        name = name or waiting.name
    if article:
        yield Document("".join(article), name)


def _skip(file: IO[bytes], count: int) -> int:
    done = 0
    while done < count and (block := file.read(min(_BLOCK, count - done))):
        done += len(block)
    return done


def _check_size(found: int, expected: int, exactly: bool, total: int, place: str) -> None:
    if found < expected or (exactly and found > expected):
        more = "more than " if found > expected else ""
        raise TokenFormerError(
            f"{place}: found {more}{min(found, total):,} bytes, expected the {total:,} that it was published with"
        )


def _cut(content: bytes, start: int, stop: int, place: str, offset: int) -> str:
    start, stop = _character_start(content, start), _character_start(content, stop)
    return decode(content[start:stop], place, offset + start)


def _character_start(content: bytes, position: int) -> int:
    while 0 < position < len(content) and content[position] & 0xC0 == 0x80:
        position -= 1
    return position
