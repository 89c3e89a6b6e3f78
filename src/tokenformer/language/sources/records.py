"""What every source gives: documents, and errors that say which of them is broken."""

from __future__ import annotations

import importlib
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tokenformer.errors import TokenFormerError

if TYPE_CHECKING:
    import numpy as np

OnError = Literal["stop", "skip"]


class Document(NamedTuple):
    """A text, and where it came from: a path, ``path:line`` in JSON, ``path: row N`` in a table.

    One that is tokenized already has its ids [t] in ``tokens``, and no text.
    """

    text: str
    name: str
    tokens: np.ndarray | None = None


class BrokenDocument(TokenFormerError):
    """One document that cannot be read, while the next one can; ``reason`` is what it is counted under."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Faults:
    """What becomes of broken documents: ``with faults:`` around one lets its error pass, or counts it.

    ``skipped`` counts, by reason, everything that is left out.
    """

    def __init__(self, on_error: OnError, skipped: Counter[str]) -> None:
        self.skipped = skipped
        self._skip = on_error == "skip"

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self._skip and isinstance(error, BrokenDocument):
            self.skipped[error.reason] += 1
            return True
        return False


def text_of_record(record: Any, place: str, text_field: str) -> str:
    """The text in ``text_field`` of a record found at ``place``.

    Raises:
        BrokenDocument: no mapping, no such field, or no Unicode string in it.
    """
    if not isinstance(record, dict):
        raise BrokenDocument(
            f"{place}: found a JSON {type(record).__name__}, expected an object with the field '{text_field}'",
            "not an object",
        )
    if text_field not in record:
        found = ", ".join(record) or "none"
        raise BrokenDocument(f"{place}: no field '{text_field}'; found {found}", "without the text field")
    return checked_text(record[text_field], place, text_field)


def checked_text(text: Any, place: str, text_field: str) -> str:
    """``text`` itself, found in ``text_field`` at ``place``.

    Raises:
        BrokenDocument: it is no string, or holds a character that is none.
    """
    if not isinstance(text, str):
        raise BrokenDocument(
            f"{place}: field '{text_field}' is a {type(text).__name__}, expected a string", "not a string"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no character
        raise BrokenDocument(
            f"{place}: field '{text_field}' holds half a surrogate pair at character {error.start}; "
            "expected Unicode text",
            "not Unicode",
        ) from error
    return text


def import_extra(module: str, source: str) -> Any:
    """Import what the extra ``data`` brings, for reading ``source``.

    Raises:
        TokenFormerError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise TokenFormerError(
            f"{source}: reading this needs {package}, which is not installed; pip install 'tokenformer[data]'"
        ) from error
