"""The documents of several sources, read from any position on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tokenformer.errors import TokenFormerError
from tokenformer.language.documents import Unit, check_sources, list_units, read_unit
from tokenformer.language.preparation.tokens import Body, Tokens, check_store, checked
from tokenformer.language.rules import DocumentRules
from tokenformer.language.sources.records import Document, Faults
from tokenformer.language.tokenizers import Tokenizer


class Group(NamedTuple):
    """Sources whose documents all go to ``split``, or, where that is None, are divided."""

    split: str | None
    sources: Sequence[str | Path]


class Position(NamedTuple):
    """How far a pass has come: group, unit of its sources, documents read of that unit."""

    group: int = 0
    unit: int = 0
    documents: int = 0


class Content(NamedTuple):
    """What is taken of a document, the number of its UTF-8 bytes and their SHA-256 (of ids, that of the ids), and the
    split that its group names."""

    body: Body
    utf8_bytes: int
    digest: bytes
    split: str | None


class Corpus:
    """Documents of groups of sources that meet the rules, in a fixed order; empty ones are left out.

    ``tokenizer`` is that of sources that are tokenized already, where it is known.

    Raises:
        TokenFormerError: a source that does not exist, or none; one that is tokenized otherwise.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        text_field: str,
        rules: DocumentRules,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        for group in groups:
            check_sources(group.sources)
        self.groups = list(groups)
        self.text_field = text_field
        self.rules = rules
        self.tokenizer = tokenizer
        self.units = cache(self._list_units)
        for number in range(len(self.groups)):
            for unit in self.units(number):
                if isinstance(unit.place, Path) and unit.is_store:
                    check_store(unit.place, tokenizer, rules)

    def _list_units(self, group: int) -> list[Unit]:
        return [unit for source in self.groups[group].sources for unit in list_units(source)]

    def read(self, unit: Unit, faults: Faults) -> Iterator[Document]:
        """The documents of one part of a source."""
        return checked(read_unit(unit, self.text_field, faults), self.tokenizer, faults)

    def content(self, document: Document, split: str | None) -> Content:
        """What is taken of a document."""
        if document.tokens is None:
            utf8 = document.text.encode("utf-8")
            return Content(document.text, len(utf8), hashlib.sha256(utf8).digest(), split)
        assert self.tokenizer is not None
        size = self.tokenizer.count_bytes(document.tokens)
        digest = hashlib.sha256(b"ids" + document.tokens.astype("<i8").tobytes()).digest()
        return Content(Tokens(document.tokens, size), size, digest, split)

    def files(self) -> Iterator[Path]:
        """Every file that is read, in the order of reading."""
        for number in range(len(self.groups)):
            for unit in self.units(number):
                yield from unit.files()

    def without_text(self, group: int, skipped: Mapping[str, int]) -> TokenFormerError:
        """The error that a group of sources has no text; ``skipped`` says what there was."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        return TokenFormerError(
            f"{', '.join(map(str, self.groups[group].sources))}: an empty corpus: found no text"
            + (f" (skipped: {reasons})" if reasons else "")
        )


class Reading:
    """One pass over a corpus from ``start`` on; between two texts ``position`` and ``skipped`` say how far it is.

    ``skipped`` counts by reason what was left out. To go on where another pass was, give what it had: its
    position, what it had skipped and the digests of the texts that it gave.
    """

    def __init__(
        self,
        corpus: Corpus,
        start: Position = Position(),
        skipped: Mapping[str, int] | None = None,
        digests: Iterable[bytes] = (),
    ) -> None:
        self.position = start
        self.skipped: Counter[str] = Counter(skipped or {})
        self._corpus = corpus
        self._deduplicate = corpus.rules.deduplicate
        self._seen = {_key(digest) for digest in digests} if self._deduplicate else set()

    def __iter__(self) -> Iterator[Content]:
        start = self.position
        for group in range(start.group, len(self._corpus.groups)):
            split = self._corpus.groups[group].split
            for document in self._documents(group, start if group == start.group else Position(group)):
                content = self._corpus.content(document, split)
                if self._first_seen(content.digest):
                    yield content
                else:
                    self.skipped["duplicate"] += 1
        self.position = Position(len(self._corpus.groups))  # past what was skipped after the last text

    def _documents(self, group: int, start: Position) -> Iterator[Document]:
        rules = self._corpus.rules
        for number, unit in enumerate(self._corpus.units(group)[start.unit :], start=start.unit):
            done = start.documents if number == start.unit else 0
            skipped_before = dict(self.skipped)
            documents = self._corpus.read(unit, Faults(rules.on_error, self.skipped))
            for count, document in enumerate(documents, start=1):
                if count < done:
                    continue
                if count == done:  # all that was passed over on the way here is counted already
                    self.skipped.clear()
                    self.skipped.update(skipped_before)
                    continue
                self.position = Position(group, number, count)
                reason = rules.refusal(document)
                if reason is None:
                    yield document
                else:
                    self.skipped[reason] += 1

    def _first_seen(self, digest: bytes) -> bool:
        """Whether a text comes for the first time, by half of its hash: about 100 bytes of memory a text."""
        if not self._deduplicate:
            return True
        before = len(self._seen)
        self._seen.add(_key(digest))
        return len(self._seen) > before


def _key(digest: bytes) -> bytes:
    return digest[:16]
