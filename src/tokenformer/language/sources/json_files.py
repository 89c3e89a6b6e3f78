"""JSON lines, and JSON files that hold a list."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenformer.language.sources.compression import explain_damage, open_bytes
from tokenformer.language.sources.records import (
    BrokenDocument,
    Document,
    Faults,
    checked_text,
    text_of_record,
)
from tokenformer.language.sources.text_files import decode

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def read_json_lines(path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    """One document in ``text_field`` of each line; blank lines are none."""
    offset = 0
    with explain_damage(path), open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            with faults:
                text = decode(line, place, offset).removeprefix("\ufeff")
                if text.strip():
                    yield Document(text_of_record(_parse_line(text, place), place, text_field), place)
            offset += len(line)


def read_json_file(path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    """Each string or object of a list; the list is the file's content or the one list in its object.

    An object that has ``text_field`` itself is one document. The file is held in memory and checked whole.
    """
    with explain_damage(path), open_bytes(path) as file:
        content = file.read()
    with faults:
        text = decode(content, str(path)).removeprefix("\ufeff")
        yield from _documents(path, text, text_field, faults)


def _documents(path: Path, text: str, text_field: str, faults: Faults) -> Iterator[Document]:
    try:
        start, end, whole = _list_position(text, path, text_field)
        _require_end(text, end)
        if whole is not None:
            yield Document(text_of_record(whole, f"{path}:1", text_field), f"{path}:1")
            return
        line, counted = 1, 0
        for value, position in _items(text, start):
            line, counted = line + text.count("\n", counted, position), position
            place = f"{path}:{line}"
            with faults:
                if isinstance(value, str):
                    yield Document(checked_text(value, place, text_field), place)
                else:
                    yield Document(text_of_record(value, place, text_field), place)
    except json.JSONDecodeError as error:
        raise _invalid(f"{path}:{error.lineno}", error) from error
    except RecursionError as error:
        raise _too_deep(str(path)) from error


def _list_position(text: str, path: Path, text_field: str) -> tuple[int, int, dict[str, Any] | None]:
    """Where the list begins and where the file's value ends; or the object that is itself a document."""
    start = _skip_space(text, 0)
    value, end = _DECODER.raw_decode(text, start)
    if isinstance(value, list):
        return start, end, None
    if not isinstance(value, dict):
        raise BrokenDocument(
            f"{path}: found a JSON {type(value).__name__}, expected a list, or an object with a list",
            "not a list",
        )
    if text_field in value and not isinstance(value[text_field], list):
        return start, end, value
    lists = [name for name, content in value.items() if isinstance(content, list)]
    if len(lists) != 1:
        raise BrokenDocument(
            f"{path}: an object with {len(lists)} lists ({', '.join(lists) or 'no field'}), expected one list "
            f"of documents or the field '{text_field}'; turn the file into a list or into .jsonl",
            "without one list",
        )
    return _field_position(text, start, lists[0]), end, None


def _field_position(text: str, start: int, name: str) -> int:
    """Where the value of field ``name`` begins in the valid object at ``start``; the last one counts."""
    found = position = _skip_space(text, start + 1)
    while text[position] == '"':
        key, end = _DECODER.raw_decode(text, position)
        value = _skip_space(text, _skip_space(text, end) + 1)  # past the colon
        if key == name:
            found = value
        _, end = _DECODER.raw_decode(text, value)
        end = _skip_space(text, end)
        if text[end] == "}":
            break
        position = _skip_space(text, end + 1)
    return found


def _items(text: str, start: int) -> Iterator[tuple[Any, int]]:
    """Values of the valid list at ``start``, each with where it begins."""
    position = _skip_space(text, start + 1)
    while text[position] != "]":
        value, end = _DECODER.raw_decode(text, position)
        yield value, position
        position = _skip_space(text, end)
        if text[position] == ",":
            position = _skip_space(text, position + 1)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _require_end(text: str, end: int) -> None:
    end = _skip_space(text, end)
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _parse_line(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _invalid(place, error) from error
    except RecursionError as error:
        raise _too_deep(place) from error


def _invalid(place: str, error: json.JSONDecodeError) -> BrokenDocument:
    return BrokenDocument(f"{place}: invalid JSON at column {error.colno} ({error.msg})", "invalid JSON")


def _too_deep(place: str) -> BrokenDocument:
    return BrokenDocument(f"{place}: JSON nested too deeply", "invalid JSON")
