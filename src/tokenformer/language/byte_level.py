"""The byte-level alphabet of GPT-2 tokenizers, and the byte tokenizer as a ``tokenizers`` file."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

END_OF_TEXT = "<|endoftext|>"
BYTE_END_ID = 256


@cache
def byte_alphabet() -> tuple[str, ...]:
    """The printable character that stands for each byte: itself where printable Latin-1, else U+0100 on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    stand_ins = iter(range(256, 512))
    return tuple(chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256))


@cache
def _byte_of() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_alphabet())}


def token_to_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; one with other characters (an added token) is its own text."""
    table = _byte_of()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode("utf-8")


@cache
def byte_tokenizer_definition() -> str:
    """``tokenizer.json`` with id k for byte k and 256 for a document's end: byte-level BPE without merges."""
    end = {"id": BYTE_END_ID, "content": END_OF_TEXT, "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {character: byte for byte, character in enumerate(byte_alphabet())},
        "merges": [],
    }
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    return json.dumps(definition, indent=2, ensure_ascii=False) + "\n"
