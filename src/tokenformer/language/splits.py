"""Which text is trained on and which is held out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import SplitRule
from tokenformer.language.documents import check_sources, read_documents
from tokenformer.language.rules import DocumentRules


class Part(NamedTuple):
    """A text, or one side of a cut text, and the split it belongs to."""

    split: str
    text: str


class _Content(NamedTuple):
    """A text that is taken, its UTF-8 bytes and their SHA-256."""

    text: str
    utf8: bytes
    digest: bytes


class Survey(NamedTuple):
    """What one pass over a corpus finds: ``utf8_bytes`` of all text and its hash; of the sources that are to be
    divided, ``documents``, ``divided_bytes`` and ``held_out``, the documents that fall to validation by their hash.
    """

    documents: int
    divided_bytes: int
    held_out: int
    utf8_bytes: int
    sha256: str


class Corpus:
    """Documents of several sources that meet the rules, read anew at each pass; empty texts are left out.

    ``separate`` are sources of a split of their own, by its name; those without any are ignored. ``skipped``
    counts, by reason, what the latest pass left out.

    Raises:
        TokenFormerError: a source that does not exist, or none.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        separate: Mapping[str, Sequence[str | Path]],
        text_field: str,
        rules: DocumentRules,
    ) -> None:
        self._sources = list(sources)
        self._separate = {split: list(given) for split, given in separate.items() if given}
        for given in (self._sources, *self._separate.values()):
            check_sources(given)
        self._text_field = text_field
        self._rules = rules
        self.skipped: Counter[str] = Counter()

    def survey(self, validation_fraction: float, on_text: Callable[[str], None]) -> Survey:
        """Count and hash all texts; ``on_text`` sees each.

        Raises:
            TokenFormerError: there is no text, or a source cannot be read.
        """
        corpus_hash = hashlib.sha256()
        first_seen = self._begin_pass()
        documents = divided_bytes = held_out = 0
        for content in self._some_contents(self._sources, first_seen):
            corpus_hash.update(content.digest)
            documents += 1
            divided_bytes += len(content.utf8)
            held_out += _hash_fraction(content.digest) < validation_fraction
            on_text(content.text)
        utf8_bytes = divided_bytes
        for sources in self._separate.values():
            for content in self._some_contents(sources, first_seen):
                corpus_hash.update(content.digest)
                utf8_bytes += len(content.utf8)
                on_text(content.text)
        return Survey(documents, divided_bytes, held_out, utf8_bytes, corpus_hash.hexdigest())

    def parts(self, rule: SplitRule) -> Iterator[Part]:
        """All texts with their splits, in a fixed order."""
        first_seen = self._begin_pass()
        yield from _divide(self._contents(self._sources, first_seen), rule)
        for split, sources in self._separate.items():
            for content in self._contents(sources, first_seen):
                yield Part(split, content.text)

    def _begin_pass(self) -> Callable[[bytes], bool]:
        self.skipped.clear()
        return _FirstSeen() if self._rules.deduplicate else lambda digest: True

    def _some_contents(
        self, sources: Sequence[str | Path], first_seen: Callable[[bytes], bool]
    ) -> Iterator[_Content]:
        """As ``_contents``; an error where there is none."""
        empty = True
        for content in self._contents(sources, first_seen):
            empty = False
            yield content
        if empty:
            raise TokenFormerError(self._nothing_in(sources))

    def _contents(
        self, sources: Sequence[str | Path], first_seen: Callable[[bytes], bool]
    ) -> Iterator[_Content]:
        for text in self._taken(sources):
            utf8 = text.encode("utf-8")
            digest = hashlib.sha256(utf8).digest()
            if first_seen(digest):
                yield _Content(text, utf8, digest)
            else:
                self.skipped["duplicate"] += 1

    def _taken(self, sources: Sequence[str | Path]) -> Iterator[str]:
        rules = self._rules
        for source in sources:
            for document in read_documents(
                source, text_field=self._text_field, on_error=rules.on_error, skipped=self.skipped
            ):
                reason = rules.refusal(document)
                if reason is None:
                    yield document.text
                else:
                    self.skipped[reason] += 1

    def _nothing_in(self, sources: Sequence[str | Path]) -> str:
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        return f"{', '.join(map(str, sources))}: an empty corpus: found no text" + (
            f" (skipped: {skipped})" if skipped else ""
        )


class _FirstSeen:
    """Whether a text comes for the first time, by half of its hash: about 100 bytes of memory a text."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, digest: bytes) -> bool:
        before = len(self._seen)
        self._seen.add(digest[:16])
        return len(self._seen) > before


def choose_rule(survey: Survey, validation_fraction: float) -> SplitRule:
    """By content hash where that leaves documents on both sides, else the end of the text is held out."""
    if 0 < survey.held_out < survey.documents:
        return SplitRule(method="content_hash", validation_fraction=validation_fraction)
    cut = max(1, survey.divided_bytes - max(1, round(survey.divided_bytes * validation_fraction)))
    return SplitRule(method="tail", validation_fraction=validation_fraction, cut=cut)


def _divide(contents: Iterable[_Content], rule: SplitRule) -> Iterator[Part]:
    if rule.method == "tail":
        assert rule.cut is not None
        yield from _divide_at(contents, rule.cut)
        return
    fraction = (rule.validation_fraction or 0) if rule.method == "content_hash" else 0
    for content in contents:
        yield Part("validation" if _hash_fraction(content.digest) < fraction else "train", content.text)


def _divide_at(contents: Iterable[_Content], cut: int) -> Iterator[Part]:
    start = 0
    for text, utf8, _ in contents:
        end = start + len(utf8)
        if end <= cut:
            yield Part("train", text)
        elif cut <= start and start > 0:
            yield Part("validation", text)
        else:
            position = _boundary(utf8, cut - start, first=start == 0)
            for split, side in (("train", utf8[:position]), ("validation", utf8[position:])):
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
