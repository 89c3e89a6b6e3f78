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

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
FLOATS = {6: "float64", 7: "float32"}
HEADER = struct.Struct("<9sQBQQ")


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
    """Memory-mapped reader of ``<prefix>.bin`` and ``<prefix>.idx``; tokens are never loaded whole.

    Raises:
        TokenFormerError: a file is missing, truncated or corrupt, has another magic or a dtype that is no
            integer; the message names the file, what was found and what was expected.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        index = _map(index_path(prefix), np.dtype(np.uint8))
        self.dtype, sequences, length = _read_header(index, index_path(prefix))
        sizes_end = HEADER.size + 4 * sequences
        pointers_end = sizes_end + 8 * sequences
        self._sizes = index[HEADER.size : sizes_end].view("<i4")
        pointers = index[sizes_end:pointers_end].view("<i8")
        documents_end = pointers_end + 8 * length
        self._documents = index[pointers_end:documents_end].view("<i8")
        _check_modes(index[documents_end:], index_path(prefix))
        self._check_index(pointers, length)
        self.num_tokens = int(self._sizes.sum(dtype=np.int64))
        self._starts = pointers
        self._check_data_size()
        self._tokens = _map(data_path(prefix), self.dtype)

    @property
    def num_documents(self) -> int:
        """Documents in the store."""
        return len(self._documents) - 1

    def document(self, i: int) -> np.ndarray:
        """Ids of document ``i`` [t], its end-of-document id included.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        return self._tokens[self._start_of(self._documents[i]) : self._start_of(self._documents[i + 1])]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids ``start`` to ``stop`` of all documents laid end to end [stop - start], a read-only view.

        Raises:
            IndexError: the range leaves the store.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        return self._tokens[start:stop]

    def _start_of(self, sequence: int) -> int:
        if sequence == len(self._sizes):
            return self.num_tokens
        return int(self._starts[sequence]) // self.dtype.itemsize

    def _check_index(self, pointers: np.ndarray, length: int) -> None:
        path, sequences = index_path(self.prefix), len(self._sizes)
        documents = self._documents
        if sequences and int(self._sizes.min()) < 0:
            raise TokenFormerError(f"{path}: corrupt: a sequence of {self._sizes.min()} tokens")
        ends = np.cumsum(self._sizes, dtype=np.int64) * self.dtype.itemsize
        if sequences and (pointers[0] != 0 or not np.array_equal(pointers[1:], ends[:-1])):
            raise TokenFormerError(f"{path}: corrupt: its pointers do not follow from its sequence sizes")
        if not length or documents[0] != 0 or documents[-1] != sequences or np.any(np.diff(documents) < 0):
            raise TokenFormerError(
                f"{path}: corrupt: its document index does not run from 0 to its {sequences} sequences"
            )

    def _check_data_size(self) -> None:
        path, expected = data_path(self.prefix), self.num_tokens * self.dtype.itemsize
        found = _size(path)
        if found != expected:
            state = "truncated" if found < expected else "too long"
            raise TokenFormerError(
                f"{path}: {state}: found {found} bytes, expected {expected} "
                f"({self.num_tokens} tokens of {self.dtype.itemsize} bytes)"
            )


def _read_header(index: np.ndarray, path: Path) -> tuple[np.dtype, int, int]:
    if len(index) < HEADER.size:
        raise TokenFormerError(
            f"{path}: truncated: found {len(index)} bytes, expected a header of {HEADER.size}"
        )
    magic, version, code, sequences, documents = HEADER.unpack(index[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise TokenFormerError(f"{path}: begins with {magic!r}, expected {MAGIC!r} (a Megatron index)")
    if version != VERSION:
        raise TokenFormerError(f"{path}: format version {version}, expected {VERSION}")
    if code not in DTYPES:
        found = f"{code} ({FLOATS[code]})" if code in FLOATS else str(code)
        known = ", ".join(f"{known} ({np.dtype(dtype)})" for known, dtype in DTYPES.items())
        raise TokenFormerError(f"{path}: dtype code {found}, expected an integer: {known}")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if len(index) not in (expected, expected + sequences):  # with the modes of the sequences
        state = "truncated or corrupt" if len(index) < expected else "too long"
        raise TokenFormerError(
            f"{path}: {state}: found {len(index)} bytes, expected {expected} "
            f"({sequences} sequences, document index of {documents})"
        )
    return np.dtype(DTYPES[code]).newbyteorder("<"), sequences, documents


def _check_modes(modes: np.ndarray, path: Path) -> None:
    """Refuse sequences that are not of mode 0, text: their ids are of something else."""
    other = np.flatnonzero(modes)
    if len(other):
        raise TokenFormerError(
            f"{path}: sequence {other[0]} has mode {int(modes[other[0]])}, expected 0 (text) for all of them"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise TokenFormerError(
            f"{path}: cannot be read ({error.strerror}); expected a token store"
        ) from error


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if not _size(path):
        return np.empty(0, dtype)
    try:
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
    except OSError as error:
        raise TokenFormerError(
            f"{path}: cannot be read ({error.strerror}); expected a token store"
        ) from error
