"""Changes of the architecture that a comparison tries before the library has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.growth.plan import Trial


@contextmanager
def trying(trials: Sequence[Trial]) -> Iterator[None]:
    """``qk_norm``: queries and keys of each head divided by their root mean square, without a gain; ``out_norm``: so is
    what each head gives to the output projection; ``affine_norms``: the norms inside a TokenFormer's blocks have weight
    and bias, as a Transformer's have."""
    with ExitStack() as stack:
        for trial in trials:
            stack.enter_context(_TRIALS[trial]())
        yield


@contextmanager
def _qk_norm() -> Iterator[None]:
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


@contextmanager
def _out_norm() -> Iterator[None]:
    import torch.nn.functional as F

    import tokenformer.layers.attention as attention

    former = attention.causal_attention

    def normed(query: Any, *rest: Any) -> Any:
        return F.rms_norm(former(query, *rest), query.shape[-1:])

    attention.causal_attention = normed  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.causal_attention = former


@contextmanager
def _affine_norms() -> Iterator[None]:
    from torch import nn

    import tokenformer.models.tokenformer.model as model

    former = model._block

    def affine(config: Any, generator: Any) -> Any:
        block = former(config, generator)
        for name in ("attention_norm", "ffn_norm"):
            setattr(block, name, nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))
        return block

    model._block = affine
    try:
        yield
    finally:
        model._block = former


_TRIALS = {"qk_norm": _qk_norm, "out_norm": _out_norm, "affine_norms": _affine_norms}
