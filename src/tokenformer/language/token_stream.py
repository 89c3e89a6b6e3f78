"""The tokens of a split as one stream, in however many files they lie."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np

from tokenformer.errors import TokenFormerError
from tokenformer.language.store import TokenStore, index_path, shard_prefixes


class TokenStream:
    """The shards of a split laid end to end, documents numbered through; no document straddles two shards.

    ``prefix`` names the whole: the directory and the split.

    Raises:
        TokenFormerError: a shard cannot be opened, or its dtype is not that of the first.
    """

    def __init__(self, directory: Path | str, split: str, shards: int = 1) -> None:
        self.prefix = Path(directory) / split
        self.shards = [TokenStore(prefix) for prefix in shard_prefixes(Path(directory), split, shards)]
        self.dtype = self.shards[0].dtype
        for shard in self.shards:
            if shard.dtype != self.dtype:
                raise TokenFormerError(
                    f"{index_path(shard.prefix)}: tokens are {shard.dtype}, expected {self.dtype} as in "
                    f"{index_path(self.shards[0].prefix)}"
                )
        self._token_starts = [0, *accumulate(shard.num_tokens for shard in self.shards)]
        self._document_starts = [0, *accumulate(shard.num_documents for shard in self.shards)]

    @property
    def num_tokens(self) -> int:
        """Tokens in all shards."""
        return self._token_starts[-1]

    @property
    def num_documents(self) -> int:
        """Documents in all shards."""
        return self._document_starts[-1]

    @property
    def retries(self) -> int:
        """Reads that had to be tried again in this process."""
        return sum(shard.retries for shard in self.shards)

    def document_starts(self) -> np.ndarray:
        """The place of each document in the stream, and the end of the last [documents + 1] int64.

        Raises:
            DataError: a file cannot be read any more.
        """
        parts = [
            shard.document_starts()[:-1] + first
            for shard, first in zip(self.shards, self._token_starts, strict=False)
        ]
        return np.append(np.concatenate(parts), self.num_tokens)

    def document(self, i: int) -> np.ndarray:
        """Ids of document ``i`` [t], its end-of-document id included.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        shard = bisect_right(self._document_starts, i) - 1
        return self.shards[shard].document(i - self._document_starts[shard])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids ``start`` to ``stop`` of the stream [stop - start], read-only.

        Raises:
            IndexError: the range leaves the stream.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        shard = max(bisect_right(self._token_starts, start, hi=len(self.shards)) - 1, 0)
        parts = []
        while start < stop:
            first, end = self._token_starts[shard : shard + 2]
            if start < end:
                parts.append(self.shards[shard].tokens(start - first, min(stop, end) - first))
                start = min(stop, end)
            shard += 1
        if len(parts) == 1:
            return parts[0]
        joined = np.concatenate(parts) if parts else np.empty(0, self.dtype)
        joined.flags.writeable = False
        return joined
