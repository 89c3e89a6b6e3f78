"""Which text is trained on and which is held out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import SplitRule
from tokenformer.language.documents import check_sources, read_documents


class Part(NamedTuple):
    """A text, or one side of a cut text, and the split it belongs to."""

    split: str
    text: str


class Survey(NamedTuple):
    """What one pass over a corpus finds; ``held_out`` of the documents fall to validation by their hash."""

    documents: int
    utf8_bytes: int
    held_out: int
    sha256: str


class Corpus:
    """Documents of several sources, read anew at each pass; empty texts are left out.

    ``skipped`` counts, by reason, what the latest pass left out.

    Raises:
        TokenFormerError: a source that does not exist, or none.
    """

    def __init__(
        self, sources: Sequence[str | Path], validation_sources: Sequence[str | Path], text_field: str
    ) -> None:
        check_sources(sources)
        if validation_sources:
            check_sources(validation_sources)
        self._sources = list(sources)
        self._validation_sources = list(validation_sources)
        self._text_field = text_field
        self.skipped: Counter[str] = Counter()

    def survey(self, validation_fraction: float, on_text: Callable[[str], None]) -> Survey:
        """Count and hash all texts; ``on_text`` sees each.

        Raises:
            TokenFormerError: there is no text, or a source cannot be read.
        """
        self.skipped.clear()
        corpus_hash = hashlib.sha256()
        documents = utf8_bytes = held_out = 0
        for sources in filter(None, (self._sources, self._validation_sources)):
            before = documents
            for text in self._texts(sources):
                content = text.encode("utf-8")
                digest = hashlib.sha256(content).digest()
                corpus_hash.update(digest)
                documents += 1
                utf8_bytes += len(content)
                held_out += _hash_fraction(digest) < validation_fraction
                on_text(text)
            if documents == before:
                raise TokenFormerError(self._nothing_in(sources))
        return Survey(documents, utf8_bytes, held_out, corpus_hash.hexdigest())

    def parts(self, rule: SplitRule) -> Iterator[Part]:
        """All texts with their splits, in a fixed order."""
        self.skipped.clear()
        yield from _divide(self._texts(self._sources), rule)
        for text in self._texts(self._validation_sources):
            yield Part("validation", text)

    def _texts(self, sources: Sequence[str | Path]) -> Iterator[str]:
        for source in sources:
            for document in read_documents(source, text_field=self._text_field, skipped=self.skipped):
                if document.text:
                    yield document.text
                else:
                    self.skipped["empty"] += 1

    def _nothing_in(self, sources: Sequence[str | Path]) -> str:
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        return f"{', '.join(map(str, sources))}: an empty corpus: found no text" + (
            f" (skipped files: {skipped})" if skipped else ""
        )


def choose_rule(survey: Survey, validation_fraction: float) -> SplitRule:
    """By content hash where that leaves documents on both sides, else the end of the text is held out."""
    if 0 < survey.held_out < survey.documents:
        return SplitRule(method="content_hash", validation_fraction=validation_fraction)
    cut = max(1, survey.utf8_bytes - max(1, round(survey.utf8_bytes * validation_fraction)))
    return SplitRule(method="tail", validation_fraction=validation_fraction, cut=cut)


def _divide(texts: Iterable[str], rule: SplitRule) -> Iterator[Part]:
    if rule.method == "tail":
        assert rule.cut is not None
        yield from _divide_at(texts, rule.cut)
        return
    for text in texts:
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        held_out = rule.method == "content_hash" and _hash_fraction(digest) < (rule.validation_fraction or 0)
        yield Part("validation" if held_out else "train", text)


def _divide_at(texts: Iterable[str], cut: int) -> Iterator[Part]:
    start = 0
    for text in texts:
        content = text.encode("utf-8")
        end = start + len(content)
        if end <= cut:
            yield Part("train", text)
        elif cut <= start and start > 0:
            yield Part("validation", text)
        else:
            position = _boundary(content, cut - start, first=start == 0)
            for split, side in (("train", content[:position]), ("validation", content[position:])):
                if side:
                    yield Part(split, side.decode("utf-8"))
        start = end


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


def _hash_fraction(digest: bytes) -> float:
    return int.from_bytes(digest[:8], "big") / 2**64
