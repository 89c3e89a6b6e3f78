"""Which growth of a Pattention layer can be. No torch here, so that a ladder is checked before anything starts."""

from __future__ import annotations

from typing import Literal

from tokenformer.errors import TokenFormerError

GrowthInit = Literal["exact", "copies", "random"]
NewTokens = Literal["zero_keys", "zero_values"]
"""What of the new tokens is zero after ``exact`` growth, so that they add nothing; the rest is drawn as at init."""


def check_growth(
    old: int, new: int, init: str, norm_activation: str, field: str, new_tokens: NewTokens = "zero_keys"
) -> None:
    """Refuse a growth that cannot be; needs sizes only.

    Raises:
        TokenFormerError: ``new`` is below ``old``; ``exact`` for softmax; ``zero_values`` for another kind than
            ``gelu`` or another init than ``exact``; ``copies`` where ``new`` is no multiple.
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
    if new_tokens == "zero_values":
        _check_zero_values(init, norm_activation)
    if init == "copies" and new % old:
        raise TokenFormerError(
            f"{field}: found {new}, but init 'copies' needs a whole multiple of the {old} tokens there are"
        )


def _check_zero_values(init: str, norm_activation: str) -> None:
    if init != "exact":
        raise TokenFormerError(f"new_tokens 'zero_values' belongs to init 'exact', but init is '{init}'")
    if norm_activation != "gelu":
        raise TokenFormerError(
            f"new_tokens 'zero_values' is not exact for norm_activation '{norm_activation}': scores of new keys that "
            "are not zero join its norm and so change every weight; only 'gelu' weighs each token alone"
        )
