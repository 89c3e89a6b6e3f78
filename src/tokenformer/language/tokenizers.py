"""Tokenizers: bytes, a newly trained byte-level BPE, or any Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_json, read_text, write_json, write_text
from tokenformer.language.byte_level import (
    BYTE_END_ID,
    END_OF_TEXT,
    byte_tokenizer_definition,
    token_to_bytes,
)
from tokenformer.language.pieces import LONG, groups, pieces, words_begin_at_spaces
from tokenformer.language.text_stream import ByteLevelStream, GenericStream, TextStream
from tokenformer.models.hub import TOKENIZER_FILES, local_or_hub

END_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>")
"""Where the end-of-document token is not named, the first of these that the vocabulary has."""

VOCABULARY_MULTIPLE = 128
SMALLEST_BPE = 257

_ENCODED_CHARACTERS = 2**21  # at once: the library holds over a hundred bytes for each

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


class Tokenizer:
    """Text to ids and back, over a ``tokenizers`` definition.

    ``vocab_size`` counts real ids; those from there to ``padded_vocab_size`` (a multiple of 128) are padding
    and never stand for text. Text is only ever encoded to ordinary ids, also where it spells a special token,
    unless ``allow_special`` is asked for. ``definition`` is the content of its ``tokenizer.json``.

    Raises:
        TokenFormerError: ``definition`` is no tokenizer, or has no end-of-document token.
    """

    def __init__(self, definition: str, *, eos_token: str | None = None, source: str = "tokenizer") -> None:
        self.definition = definition
        self._backend = _parse(definition, source)
        self._backend.encode_special_tokens = True
        self.eos_token = _find_end_token(self._backend, eos_token, source)
        self.eos_token_id = self._id_of(self.eos_token)
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.padded_vocab_size = -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.sha256 = _canonical_sha256(definition)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: the end of a document, padding marks and the like."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset({self.eos_token_id} | {id for id, token in added.items() if token.special})

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of ``text``; nothing is put before or after them.

        Raises:
            TokenFormerError: ``text`` holds half a surrogate pair, which has no UTF-8.
        """
        return [int(id) for id in self.encode_batch([text], allow_special=allow_special)[0]]

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[np.ndarray]:
        """Ids of each text as an integer array [t]; faster than one by one."""
        for text in texts:
            _utf8(text)
        backend = self._special_backend if allow_special else self._backend
        found: list[list[np.ndarray]] = [[] for _ in texts]
        # a piece could end within a special token
        numbered = enumerate(texts) if allow_special else self._pieces(texts)
        for group in groups(numbered, _ENCODED_CHARACTERS):
            encodings = backend.encode_batch_fast([text for _, text in group], add_special_tokens=False)
            for (number, _), encoding in zip(group, encodings, strict=True):
                found[number].append(np.array(encoding.ids, dtype=np.int64))
        return [arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for arrays in found]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD, padding ids nothing."""
        ids = [int(id) for id in ids]
        if self._token_bytes is not None:
            return b"".join(self._bytes_of(id, skip_special) for id in ids).decode("utf-8", errors="replace")
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special)
        return text

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """A decoder for ids that arrive one at a time; it never emits half a character."""
        if self._token_bytes is not None:
            return ByteLevelStream(lambda id: self._bytes_of(id, skip_special))
        return GenericStream(lambda ids: self.decode(ids, skip_special=skip_special))

    def count_bytes(self, ids: np.ndarray) -> int:
        """UTF-8 bytes of the text that ``ids`` [t] stand for; special ids count 0."""
        if self._byte_lengths is None:
            documents = np.split(ids, np.flatnonzero(ids == self.eos_token_id) + 1)
            return sum(len(self.decode(document).encode("utf-8")) for document in documents)
        counts = np.bincount(ids, minlength=len(self._byte_lengths))[: len(self._byte_lengths)]
        return int(counts @ self._byte_lengths)

    def save(self, directory: Path | str) -> None:
        """Write ``tokenizer.json``, as it was read; and, only where the end-of-document token is not the one
        that would be found, ``tokenizer_config.json`` with its name."""
        write_text(Path(directory) / TOKENIZER_FILE, self.definition)
        if self.eos_token != _find_end_token(self._backend, None, TOKENIZER_FILE, required=False):
            write_json(Path(directory) / CONFIG_FILE, {"eos_token": self.eos_token})

    def _pieces(self, texts: Sequence[str]) -> Iterator[tuple[int, str]]:
        for number, text in enumerate(texts):
            if len(text) > LONG and self.works_in_pieces:
                yield from ((number, piece) for piece in pieces(text))
            else:
                yield number, text

    @cached_property
    def works_in_pieces(self) -> bool:
        """Byte-level, and nothing is put before a text, so that ids of pieces add up to those of the whole."""
        whole, first, second = self.encode_batch(["a\na", "a\n", "a"])
        return self._token_bytes is not None and whole.tolist() == [*first, *second]

    @cached_property
    def works_in_words(self) -> bool:
        """Ids of a text cut before a single space, where no other white space is, add up to those of the whole."""
        return self.works_in_pieces and words_begin_at_spaces(self._special_backend)

    def _id_of(self, token: str) -> int:
        id = self._backend.token_to_id(token)
        assert id is not None
        return id

    def _bytes_of(self, id: int, skip_special: bool) -> bytes:
        assert self._token_bytes is not None
        if not 0 <= id < len(self._token_bytes) or (skip_special and id in self.special_ids):
            return b""
        return self._token_bytes[id]

    @cached_property
    def _special_backend(self) -> Backend:
        return _parse(self.definition, TOKENIZER_FILE)

    @cached_property
    def _token_bytes(self) -> list[bytes] | None:
        """The bytes of each id, where the tokenizer works on bytes."""
        if not isinstance(self._backend.decoder, decoders.ByteLevel):
            return None
        table = [b""] * self.vocab_size
        for token, id in self._backend.get_vocab(with_added_tokens=True).items():
            table[id] = token_to_bytes(token)
        return table

    @cached_property
    def _byte_lengths(self) -> np.ndarray | None:
        if self._token_bytes is None:
            return None
        special = self.special_ids
        lengths = [0 if id in special else len(token) for id, token in enumerate(self._token_bytes)]
        return np.array(lengths, dtype=np.int64)


class ByteTokenizer(Tokenizer):
    """Byte k has id k and id 256 ends a document: the ids that its ``tokenizer.json`` gives, only faster."""

    def __init__(self) -> None:
        super().__init__(byte_tokenizer_definition())
        assert self.eos_token_id == BYTE_END_ID

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[np.ndarray]:
        if allow_special:
            return super().encode_batch(texts, allow_special=True)
        return [np.frombuffer(_utf8(text), dtype=np.uint8) for text in texts]


def load_tokenizer(path: Path | str, *, eos_token: str | None = None) -> Tokenizer:
    """Read a ``tokenizer.json``, or the one in a directory or (a string ``owner/name``) on the Hugging Face hub.

    The end-of-document token is ``eos_token``, or the one that a ``tokenizer_config.json`` beside the file
    names, or the first of ``END_TOKENS`` that the vocabulary has.

    Raises:
        TokenFormerError: missing or invalid file, or no end-of-document token; the hub cannot be reached.
    """
    path = local_or_hub(path, files=TOKENIZER_FILES)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    definition = read_text(file, "a tokenizer (tokenizer.json)")
    named = eos_token or _named_end_token(file.parent / CONFIG_FILE)
    return make_tokenizer(definition, eos_token=named, source=str(file))


def make_tokenizer(definition: str, *, eos_token: str | None = None, source: str = "tokenizer") -> Tokenizer:
    """The tokenizer of the content of a ``tokenizer.json``, which errors call ``source``.

    Raises:
        TokenFormerError: an invalid definition, or no end-of-document token.
    """
    tokenizer = Tokenizer(definition, eos_token=eos_token, source=source)
    is_bytes = tokenizer.sha256 == _canonical_sha256(byte_tokenizer_definition())
    return ByteTokenizer() if is_bytes else tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` ids, learned from ``texts`` (streamed, the same every time).

    All 256 bytes are in it, so that any text comes back as it was; ``<|endoftext|>`` ends a document.

    Raises:
        TokenFormerError: ``vocab_size`` is below 257.
    """
    if vocab_size < SMALLEST_BPE:
        raise TokenFormerError(
            f"bpe:{vocab_size}: too small; expected at least {SMALLEST_BPE}: 256 bytes and {END_OF_TEXT}"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return Tokenizer(backend.to_str(pretty=True) + "\n")


def _parse(definition: str, source: str) -> Backend:
    try:
        backend = Backend.from_str(definition)
    except Exception as error:  # the library raises bare Exception
        raise TokenFormerError(f"{source}: not a valid tokenizer.json ({error})") from error
    backend.no_truncation()  # what a file says of lengths is for one model's batches, not for documents
    backend.no_padding()
    return backend


def _find_end_token(backend: Backend, named: str | None, source: str, *, required: bool = True) -> str:
    candidates = (named,) if named else END_TOKENS
    for token in candidates:
        if backend.token_to_id(token) is not None:
            return token
    if not required:
        return ""
    hint = "" if named else "; name it with the option eos_token (--eos-token)"
    raise TokenFormerError(
        f"{source}: no end-of-document token in the vocabulary; expected {' or '.join(candidates)}{hint}"
    )


def _named_end_token(config: Path) -> str | None:
    if not config.is_file():
        return None
    token: Any = read_json(config, "the configuration of a tokenizer").get("eos_token")
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _canonical_sha256(definition: str) -> str:
    canonical = json.dumps(json.loads(definition), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenFormerError(
            f"text: half a surrogate pair at character {error.start}; expected Unicode text"
        ) from error
