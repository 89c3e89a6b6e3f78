"""How the next token is chosen. No torch here: the command line reads it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tokenformer.validation import StrictModel


class SamplingConfig(StrictModel):
    """Which tokens may be drawn, and from what distribution.

    The filters apply in this order, each to what the former left: ``temperature`` divides the logits (0 takes
    the likeliest token, and the filters do not matter); ``top_k`` keeps the k likeliest tokens (and ties with
    the k-th); ``top_p`` keeps the smallest set of likeliest tokens whose probabilities reach p; ``min_p``
    keeps tokens at least ``min_p`` times as likely as the likeliest one.

    Prompt i of a call draws from its own generator, seeded with ``seed + i``: alone with that seed or in any
    batch, its draws are the same.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) for values out of range.
    """

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(gt=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
