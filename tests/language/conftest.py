"""Token streams with known content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tokenformer.language.store import shard_prefixes
from tokenformer.language.store_writer import TokenStoreWriter
from tokenformer.language.token_stream import TokenStream

StreamOf = Callable[..., TokenStream]


@pytest.fixture(scope="session")
def stream_of(tmp_path_factory: pytest.TempPathFactory) -> StreamOf:
    """A stream of the tokens first, first + 1, ..., in documents of seven, spread over shards."""
    folder = tmp_path_factory.mktemp("streams")

    def make(length: int, shards: int = 1, first: int = 0) -> TokenStream:
        split = f"{length}x{shards}from{first}"
        prefixes = shard_prefixes(folder, split, shards)
        if not Path(f"{prefixes[-1]}.idx").exists():
            starts = range(0, length, 7)
            for number, prefix in enumerate(prefixes):
                with TokenStoreWriter(prefix, np.int32) as writer:
                    for start in starts[
                        number * len(starts) // shards : (number + 1) * len(starts) // shards
                    ]:
                        writer.add_document(first + np.arange(start, min(start + 7, length)))
        return TokenStream(folder, split, shards)

    return make
