"""Which documents of the sources are taken. Torch-free."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from tokenformer.language.sources.records import Document, OnError
from tokenformer.validation import StrictModel


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"found '{value}', expected a regular expression ({error})") from error
    return value


Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class DocumentRules(StrictModel):
    """Which documents of the sources are taken.

    ``min_length`` and ``max_length`` count characters; ``min_letters`` is the least share of them that must be
    letters of any script. ``include`` and ``exclude`` are Python regular expressions, searched in the text,
    ``include_name`` and ``exclude_name`` in the document's name (its path, ``path:line`` or ``path: row N``).
    ``deduplicate`` keeps the first of equal texts, documents that are given apart for another split included.
    ``on_error`` says whether a broken document ends the work or is left out and counted.
    """

    min_length: Count = 0
    max_length: Count | None = None
    min_letters: Share = 0.0
    include: Pattern | None = None
    exclude: Pattern | None = None
    include_name: Pattern | None = None
    exclude_name: Pattern | None = None
    deduplicate: bool = False
    on_error: OnError = "stop"

    def refusal(self, document: Document) -> str | None:
        """Why ``document`` is left out, in the words that it is counted under; None where it is taken."""
        text, tokens = document.text, document.tokens
        if not (text if tokens is None else len(tokens)):
            return "empty"
        if self.include_name is not None and not re.search(self.include_name, document.name):
            return "name not included"
        if self.exclude_name is not None and re.search(self.exclude_name, document.name):
            return "name excluded"
        return self._text_refusal(text) if tokens is None else None

    def on_text(self) -> list[str]:
        """Names of the rules in force that look at the text of a document."""
        standard = DocumentRules()
        names = ("min_length", "max_length", "min_letters", "include", "exclude")
        return [name for name in names if getattr(self, name) != getattr(standard, name)]

    def _text_refusal(self, text: str) -> str | None:
        if len(text) < self.min_length:
            return "too short"
        if self.max_length is not None and len(text) > self.max_length:
            return "too long"
        if self.min_letters and _letters(text) < self.min_letters * len(text):
            return "too few letters"
        if self.include is not None and not re.search(self.include, text):
            return "text not included"
        if self.exclude is not None and re.search(self.exclude, text):
            return "text excluded"
        return None

    def describe(self) -> str:
        """All rules in force, in words."""
        words = [f"at least {self.min_length:,} characters"]
        words += [] if self.max_length is None else [f"at most {self.max_length:,} characters"]
        words += [f"letters at least {self.min_letters:g} of them"] if self.min_letters else []
        for what, wanted, unwanted in (
            ("text", self.include, self.exclude),
            ("name", self.include_name, self.exclude_name),
        ):
            words += [] if wanted is None else [f"{what} with '{wanted}'"]
            words += [] if unwanted is None else [f"{what} without '{unwanted}'"]
        words += [f"{'without' if self.deduplicate else 'with'} duplicates", f"on error {self.on_error}"]
        return ", ".join(words)


def _letters(text: str) -> int:
    return sum(map(str.isalpha, text))
