"""Changes of the architecture that a comparison tries before the library has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.growth.plan import Trial


@contextmanager
def trying(trials: Sequence[Trial]) -> Iterator[None]:
    """``qk_norm``: queries and keys of each head divided by their root mean square, without a gain."""
    if not trials:
        yield
        return
    import torch.nn.functional as F

    import tokenformer.layers.attention as attention

    former = attention.causal_attention

    def normed(query: Any, key: Any, *rest: Any) -> Any:
        features = query.shape[-1:]
        return former(F.rms_norm(query, features), F.rms_norm(key, features), *rest)

    attention.causal_attention = normed  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.causal_attention = former
