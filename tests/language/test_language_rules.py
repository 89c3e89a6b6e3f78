"""Which documents are taken, and what the others are counted under."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.errors import TokenFormerError
from tokenformer.language.prepare import prepare
from tokenformer.language.rules import DocumentRules
from tokenformer.language.sources.records import Document
from tokenformer.validation import validate


@pytest.mark.parametrize(
    ("rules", "text", "name", "reason"),
    [
        ({}, "", "a", "empty"),
        ({}, " ", "a", None),
        ({"min_length": 4}, "größ", "a", None),
        ({"min_length": 5}, "größ", "a", "too short"),
        ({"max_length": 4}, "größ", "a", None),
        ({"max_length": 3}, "größ", "a", "too long"),
        ({"min_letters": 0.5}, "größ1234", "a", None),
        ({"min_letters": 0.5}, "größ12345", "a", "too few letters"),
        ({"min_letters": 1.0}, "文字", "a", None),
        ({"include": r"(?i)\bwolf\b"}, "A Wolf.", "a", None),
        ({"include": r"\bwolf\b"}, "wolfram", "wolf", "text not included"),
        ({"exclude": "lorem ipsum"}, "x lorem ipsum x", "a", "text excluded"),
        ({"exclude": "lorem ipsum"}, "x", "lorem ipsum", None),
        ({"include_name": r"\.md$"}, "x", "notes/a.md", None),
        ({"include_name": r"\.md$"}, ".md", "notes/a.txt", "name not included"),
        ({"exclude_name": "vendor/"}, "x", "lib/vendor/a.txt", "name excluded"),
    ],
)
def test_each_rule(rules: dict[str, Any], text: str, name: str, reason: str | None) -> None:
    assert DocumentRules(**rules).refusal(Document(text, name)) == reason


@given(st.text(max_size=20), st.integers(0, 20), st.integers(0, 20))
def test_lengths_count_characters(text: str, least: int, most: int) -> None:
    taken = DocumentRules(min_length=least, max_length=most).refusal(Document(text, "a")) is None
    assert taken == (bool(text) and least <= len(text) <= most)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"include": "("}, r"prepare: include: found '\(', expected a regular expression \(missing \)"),
        ({"exclude_name": "*"}, "prepare: exclude_name: found '\\*', expected a regular expression"),
        ({"min_letters": 2}, "prepare: min_letters: found 2; input should be less than or equal to 1"),
        ({"max_length": -1}, "prepare: max_length: found -1"),
        ({"max_lenght": 1}, "prepare: max_lenght: unknown field; did you mean 'max_length'"),
    ],
)
def test_wrong_rules_are_named(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenFormerError, match=message):
        validate(DocumentRules, rules, source="prepare")


def test_what_is_left_out_is_counted_by_its_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "\n".join(
            json.dumps({"text": text}) for text in ("one two", "12345", "one two three", "xyz", "x", "")
        )
    )
    (tmp_path / "v.txt").write_text("one held out")
    rules = DocumentRules(min_length=2, max_length=12, min_letters=0.6, include="one")
    data = prepare([tmp_path / "a.jsonl"], tmp_path / "data", validation=[tmp_path / "v.txt"], rules=rules)
    assert data.info.splits["train"].documents == 1
    assert data.info.skipped == {
        "empty": 1, "too few letters": 1, "too long": 1, "too short": 1, "text not included": 1,
    }  # fmt: skip
    assert data.info.rules == rules


def test_the_rules_in_words() -> None:
    assert DocumentRules().describe() == "at least 0 characters, with duplicates, on error stop"
    described = DocumentRules(
        min_length=1000, max_length=2000, min_letters=0.5, exclude="x", include_name="y", deduplicate=True
    ).describe()
    assert described == (
        "at least 1,000 characters, at most 2,000 characters, letters at least 0.5 of them, text without 'x', "
        "name with 'y', without duplicates, on error stop"
    )
