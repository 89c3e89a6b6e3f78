"""Which growth of a Pattention layer can be. No torch here, so that a ladder is checked before anything starts."""

from __future__ import annotations

from typing import Literal

from tokenformer.errors import TokenFormerError

GrowthInit = Literal["exact", "copies", "random"]


def check_growth(old: int, new: int, init: str, norm_activation: str, field: str) -> None:
    """Refuse a growth that cannot be; needs sizes only.

    Raises:
        TokenFormerError: ``new`` is below ``old``; ``exact`` for softmax; ``copies`` where ``new`` is no multiple.
    """
    if new < old:
        raise TokenFormerError(
            f"{field}: found {new}, but there are {old} parameter tokens already; growth only adds"
        )
    if init == "exact" and norm_activation == "softmax":
        raise TokenFormerError(
            "init 'exact' is not possible for norm_activation 'softmax': a token with a zero key still adds exp(0) "
            "to the denominator and so changes every weight; use init 'copies' (a whole multiple of the tokens)"
        )
    if init == "copies" and new % old:
        raise TokenFormerError(
            f"{field}: found {new}, but init 'copies' needs a whole multiple of the {old} tokens there are"
        )
