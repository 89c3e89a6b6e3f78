"""What to grow, and by how much. No torch here: a ladder of growth steps is checked before anything starts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from tokenformer.errors import TokenFormerError
from tokenformer.layers.growth_rules import GrowthInit, NewTokens, check_growth
from tokenformer.models.config import DecoderConfig, PositiveInt
from tokenformer.models.tokenformer.config import ROLES, GrowthStep, TokenFormerConfig
from tokenformer.validation import Float, StrictModel

_SIZES_THAT_STAY = {
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "width",
    "depth",
    "layers",
    "hidden",
    "heads",
}


class GrowthSpec(StrictModel):
    """One growth step: either ``factor``, or new totals for some of ``qkv``, ``proj``, ``ffn``.

    ``factor`` multiplies the parameter tokens of every role. ``init`` is the rule for the new tokens: ``exact``
    (the function stays), ``copies`` (whole multiples), ``random`` (the authors' way). ``new_tokens``: what is zero in
    the tokens of ``exact`` growth, their keys or, for ``gelu`` alone, their values.
    """

    factor: Annotated[Float, Field(gt=1, le=1e6)] | None = None
    qkv: PositiveInt | None = None
    proj: PositiveInt | None = None
    ffn: PositiveInt | None = None
    init: GrowthInit = "exact"
    new_tokens: NewTokens = "zero_keys"

    @model_validator(mode="before")
    @classmethod
    def _explain_other_sizes(cls, values: Any) -> Any:
        if isinstance(values, dict) and (asked := _SIZES_THAT_STAY & values.keys()):
            raise ValueError(
                f"{', '.join(sorted(asked))}: growth changes the number of parameter tokens, never width or depth; "
                "use factor, or qkv, proj and ffn"
            )
        return values

    @model_validator(mode="after")
    def _check_targets(self) -> GrowthSpec:
        named = [role for role in ROLES if getattr(self, role) is not None]
        if (self.factor is None) == (not named):
            raise ValueError("expected either factor, or some of qkv, proj and ffn")
        return self


def grown_config(config: DecoderConfig, spec: GrowthSpec, *, step: int | None = None) -> TokenFormerConfig:
    """The configuration after a growth step: totals, groups, tau and the growth history.

    Args:
        config: before.
        spec: what to do.
        step: training steps done so far, for the history.

    Raises:
        TokenFormerError: the model has no parameter tokens, nothing would grow, or a rule of ``init`` is broken.
    """
    if not isinstance(config, TokenFormerConfig):
        raise TokenFormerError(
            f"architecture: found '{config.architecture}', which has no parameter tokens to grow; "
            "expected 'tokenformer'"
        )
    totals = {role: target_tokens(config.param_tokens(role), spec, role) for role in ROLES}
    for role, total in totals.items():
        check_growth(
            config.param_tokens(role), total, spec.init, config.norm_activation, role, spec.new_tokens
        )
    if all(total == config.param_tokens(role) for role, total in totals.items()):
        raise TokenFormerError(
            "growth: the model already has these numbers of parameter tokens; nothing would grow"
        )
    entry = GrowthStep(
        init=spec.init,
        new_tokens=spec.new_tokens if spec.init == "exact" else None,
        step=step,
        **{f"{role}_param_tokens": n for role, n in totals.items()},
    )
    changed = {
        **{f"{role}_param_tokens": n for role, n in totals.items()},
        "param_token_groups": {
            role: _groups(config.groups(role), n, spec.init) for role, n in totals.items()
        },
        "tau": {role: _tau(config, role, n, spec.init) for role, n in totals.items()},
        "growth_history": [*(past.model_dump() for past in config.growth_history), entry.model_dump()],
    }
    return TokenFormerConfig.model_validate(config.model_dump() | changed)


def target_tokens(tokens: int, spec: GrowthSpec, role: str) -> int:
    """The new total of one role that now has ``tokens``."""
    if spec.factor is not None:
        return round(tokens * spec.factor)
    return getattr(spec, role) or tokens


def _groups(groups: tuple[int, ...], total: int, init: str) -> tuple[int, ...]:
    old = sum(groups)
    if total == old:
        return groups
    if init == "copies":
        return (*groups, *(n * (total // old - 1) for n in groups))
    return (*groups, total - old)


def _tau(config: TokenFormerConfig, role: str, total: int, init: str) -> float:
    tau = float(getattr(config.tau, role))
    if total == config.param_tokens(role) or init == "exact":
        return tau
    return float(total) if init == "random" else tau * (total // config.param_tokens(role))
