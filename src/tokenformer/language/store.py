"""Token store in the Megatron indexed format: tokens in ``<prefix>.bin``, where they lie in ``<prefix>.idx``.

Layout of ``.idx`` (little-endian), as Megatron-LM and GPT-NeoX read and write it:

    magic b"MMIDIDX\\0\\0" | version u64 = 1 | dtype code u8 | sequences s u64 | document index length u64
    sizes in tokens int32 [s] | byte pointers into .bin int64 [s] | document index int64: the first
    sequence of each document, then s | of multimodal data alone: the mode of each sequence, int8 [s]
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_file import DataFile

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
FLOATS = {6: "float64", 7: "float32"}
HEADER = struct.Struct("<9sQBQQ")

_EXPECTED = "a token store"
_CHECKED_AT_ONCE = 2**14


def token_dtype(padded_vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else int32."""
    return np.dtype(np.uint16 if padded_vocab_size < 2**16 else np.int32)


def data_path(prefix: Path | str) -> Path:
    """The ``.bin`` of a store."""
    return Path(f"{prefix}.bin")


def index_path(prefix: Path | str) -> Path:
    """The ``.idx`` of a store."""
    return Path(f"{prefix}.idx")


def shard_prefixes(directory: Path, split: str, shards: int) -> list[Path]:
    """Prefixes of a split's stores: ``<split>``, or ``<split>-00000-of-00004`` and so on where there are several."""
    if shards == 1:
        return [directory / split]
    return [directory / f"{split}-{shard:05d}-of-{shards:05d}" for shard in range(shards)]


class TokenStore:
    """The documents of one store; what is asked for is read, nothing is kept in memory.

    Raises:
        TokenFormerError: a file is missing, truncated or corrupt, has another magic or a dtype that is no
            integer; the message names the file, what was found and what was expected.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        self._index = _StoreIndex(DataFile(index_path(prefix), _EXPECTED))
        self.dtype = self._index.dtype
        self.num_tokens = self._index.check()
        self._data = DataFile(data_path(prefix), _EXPECTED)
        self._check_data_size()

    @property
    def num_documents(self) -> int:
        """Documents in the store."""
        return self._index.num_documents

    @property
    def retries(self) -> int:
        """Reads that had to be tried again in this process."""
        return self._data.retries + self._index.file.retries

    def document(self, i: int) -> np.ndarray:
        """Ids of document ``i`` [t], its end-of-document id included, read-only.

        Raises:
            IndexError: there is no such document.
            DataError: the file cannot be read any more.
        """
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        first, last = (self._start_of(int(sequence)) for sequence in self._index.documents(i, i + 2))
        return self.tokens(first, last)

    def document_starts(self) -> np.ndarray:
        """The place of each document in the stream of tokens, and the end of the last [documents + 1] int64.

        Raises:
            DataError: the file cannot be read any more.
        """
        starts = np.empty(self._index.num_sequences + 1, np.int64)
        np.floor_divide(
            self._index.pointers(0, self._index.num_sequences), self.dtype.itemsize, out=starts[:-1]
        )
        starts[-1] = self.num_tokens
        return starts[self._index.documents(0, self.num_documents + 1)]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids ``start`` to ``stop`` of all documents laid end to end [stop - start], read-only.

        Raises:
            IndexError: the range leaves the store.
            DataError: the file cannot be read any more.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        size = self.dtype.itemsize
        return np.frombuffer(self._data.read(start * size, (stop - start) * size), self.dtype)

    def _start_of(self, sequence: int) -> int:
        if sequence == self._index.num_sequences:
            return self.num_tokens
        return int(self._index.pointers(sequence, sequence + 1)[0]) // self.dtype.itemsize

    def _check_data_size(self) -> None:
        expected, found = self.num_tokens * self.dtype.itemsize, self._data.size
        if found != expected:
            state = "truncated" if found < expected else "too long"
            raise TokenFormerError(
                f"{self._data.path}: {state}: found {found} bytes, expected {expected} "
                f"({self.num_tokens} tokens of {self.dtype.itemsize} bytes)"
            )


class _StoreIndex:
    """The arrays of an ``.idx``, read in parts."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.dtype, self.num_sequences, length = _read_header(file)
        self.num_documents = length - 1
        self._pointers_from = HEADER.size + 4 * self.num_sequences
        self._documents_from = self._pointers_from + 8 * self.num_sequences
        self._modes_from = self._documents_from + 8 * length

    def sizes(self, start: int, stop: int) -> np.ndarray:
        """Tokens of sequences ``start`` to ``stop``, int32."""
        return np.frombuffer(self.file.read(HEADER.size + 4 * start, 4 * (stop - start)), "<i4")

    def pointers(self, start: int, stop: int) -> np.ndarray:
        """Where these sequences begin in ``.bin``, in bytes, int64."""
        return np.frombuffer(self.file.read(self._pointers_from + 8 * start, 8 * (stop - start)), "<i8")

    def documents(self, start: int, stop: int) -> np.ndarray:
        """Entries ``start`` to ``stop`` of the document index, int64."""
        return np.frombuffer(self.file.read(self._documents_from + 8 * start, 8 * (stop - start)), "<i8")

    def check(self) -> int:
        """Check every entry, a part at a time; returns the number of tokens."""
        self._check_documents()
        self._check_modes()
        tokens = 0
        for start in range(0, self.num_sequences, _CHECKED_AT_ONCE):
            stop = min(start + _CHECKED_AT_ONCE, self.num_sequences)
            sizes = self.sizes(start, stop)
            if sizes.min() < 0:
                raise TokenFormerError(f"{self.file.path}: corrupt: a sequence of {sizes.min()} tokens")
            ends = np.cumsum(sizes, dtype=np.int64)
            ends += tokens
            tokens = int(ends[-1])
            ends -= sizes
            ends *= self.dtype.itemsize
            if not np.array_equal(self.pointers(start, stop), ends):
                raise TokenFormerError(
                    f"{self.file.path}: corrupt: its pointers do not follow from its sequence sizes"
                )
        return tokens

    def _check_modes(self) -> None:
        """Refuse sequences that are not of mode 0, text: their ids are of something else."""
        for start in range(0, self.file.size - self._modes_from, _CHECKED_AT_ONCE):
            length = min(_CHECKED_AT_ONCE, self.file.size - self._modes_from - start)
            modes = np.frombuffer(self.file.read(self._modes_from + start, length), np.int8)
            for place in np.flatnonzero(modes)[:1]:
                raise TokenFormerError(
                    f"{self.file.path}: sequence {start + place} has mode {int(modes[place])}, expected 0 (text) for "
                    "all of them"
                )

    def _check_documents(self) -> None:
        ascending, last = self.num_documents >= 0, 0
        for start in range(0, self.num_documents + 1, _CHECKED_AT_ONCE):
            entries = self.documents(start, min(start + _CHECKED_AT_ONCE, self.num_documents + 1))
            first_fits = entries[0] == 0 if start == 0 else entries[0] >= last
            ascending = ascending and bool(first_fits) and bool((entries[1:] >= entries[:-1]).all())
            last = int(entries[-1])
        if not ascending or last != self.num_sequences:
            raise TokenFormerError(
                f"{self.file.path}: corrupt: its document index does not run from 0 to its "
                f"{self.num_sequences} sequences"
            )


def _read_header(file: DataFile) -> tuple[np.dtype, int, int]:
    path, found = file.path, file.size
    if found < HEADER.size:
        raise TokenFormerError(f"{path}: truncated: found {found} bytes, expected a header of {HEADER.size}")
    magic, version, code, sequences, documents = HEADER.unpack(file.read(0, HEADER.size))
    if magic != MAGIC:
        raise TokenFormerError(f"{path}: begins with {magic!r}, expected {MAGIC!r} (a Megatron index)")
    if version != VERSION:
        raise TokenFormerError(f"{path}: format version {version}, expected {VERSION}")
    if code not in DTYPES:
        name = f"{code} ({FLOATS[code]})" if code in FLOATS else str(code)
        known = ", ".join(f"{known} ({np.dtype(dtype)})" for known, dtype in DTYPES.items())
        raise TokenFormerError(f"{path}: dtype code {name}, expected an integer: {known}")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if found not in (expected, expected + sequences):  # with the modes of the sequences
        state = "truncated or corrupt" if found < expected else "too long"
        raise TokenFormerError(
            f"{path}: {state}: found {found} bytes, expected {expected} "
            f"({sequences} sequences, document index of {documents})"
        )
    return np.dtype(DTYPES[code]).newbyteorder("<"), sequences, documents
