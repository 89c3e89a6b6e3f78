"""Configuration of a TokenFormer: a decoder whose every projection is Pattention (arXiv 2410.23168)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tokenformer.layers.growth_rules import GrowthInit, NewTokens
from tokenformer.models.config import DecoderConfig, PositiveFloat, PositiveInt
from tokenformer.validation import Float, Int, StrictModel

NormActivation = Literal["gelu", "l2_norm_gelu", "gelu_l2_norm", "softmax"]
ROLES = ("qkv", "proj", "ffn")


class ParamTokenGroups(StrictModel):
    """Sizes of the groups of parameter tokens, by role, oldest first; each growth appends one."""

    qkv: tuple[PositiveInt, ...]
    proj: tuple[PositiveInt, ...]
    ffn: tuple[PositiveInt, ...]


class Tau(StrictModel):
    """The scale inside each Pattention, by role; n when the layer is made, kept by exact growth."""

    qkv: PositiveFloat
    proj: PositiveFloat
    ffn: PositiveFloat


class GrowthStep(StrictModel):
    """One entry of the growth history: what was done, and the totals of parameter tokens after it."""

    init: GrowthInit
    new_tokens: NewTokens | None = None
    """What was zero in the new tokens of an ``exact`` growth; null: not known, or of another growth."""
    qkv_param_tokens: PositiveInt
    proj_param_tokens: PositiveInt
    ffn_param_tokens: PositiveInt
    step: Annotated[Int, Field(ge=0)] | None = None
    """Training steps done before this growth, where it is known."""

    @property
    def note(self) -> str:
        """What to say after ``init`` where it is not its usual form."""
        return ", new values zero" if self.new_tokens == "zero_values" else ""


class TokenFormerConfig(DecoderConfig):
    """Sizes and definition of a TokenFormer.

    ``*_param_tokens`` are totals (n) of each query, key and value layer (``qkv``), of the attention output
    (``proj``) and of the feed-forward layer (``ffn``). ``param_token_groups`` splits them by growth stage and
    ``tau`` defaults to the totals. ``norm_eps`` is added to the L2 norms (0: only a
    guard at exactly zero).

    Raises:
        pydantic.ValidationError: (a ``ValueError``) for sizes that cannot be.
    """

    architecture: Literal["tokenformer"] = "tokenformer"
    class_name: ClassVar[str] = "TokenFormer"

    qkv_param_tokens: PositiveInt
    proj_param_tokens: PositiveInt
    ffn_param_tokens: PositiveInt
    param_token_groups: ParamTokenGroups = None  # type: ignore[assignment]  # filled in below
    tau: Tau = None  # type: ignore[assignment]  # filled in below
    norm_activation: NormActivation = "gelu"
    gelu_approximate: Literal["none", "tanh"] = "none"
    norm_eps: Annotated[Float, Field(ge=0)] = 0.0
    growth_history: tuple[GrowthStep, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        totals = {role: values.get(f"{role}_param_tokens") for role in ROLES}
        if any(total is None for total in totals.values()):
            return values
        # a total that is refused stands in for itself alone: its group and tau are not refused once more
        totals = {role: 1 if _is_refused(total) else total for role, total in totals.items()}
        filled = dict(values)
        if filled.get("param_token_groups") is None:
            filled["param_token_groups"] = {role: (total,) for role, total in totals.items()}
        if filled.get("tau") is None:
            filled["tau"] = totals
        return filled

    @model_validator(mode="after")
    def _check_groups(self) -> TokenFormerConfig:
        for role in ROLES:
            total, groups = self.param_tokens(role), self.groups(role)
            if sum(groups) != total:
                raise ValueError(
                    f"param_token_groups.{role} {list(groups)} add up to {sum(groups)}, "
                    f"but {role}_param_tokens is {total}"
                )
        return self

    def param_tokens(self, role: str) -> int:
        """n of one role (``qkv``, ``proj`` or ``ffn``)."""
        return int(getattr(self, f"{role}_param_tokens"))

    def groups(self, role: str) -> tuple[int, ...]:
        """Group sizes of one role, oldest first."""
        return tuple(getattr(self.param_token_groups, role))

    def parameter_counts(self) -> dict[str, int]:
        per_token = 2 * self.hidden_size * self.num_hidden_layers
        counts = {
            "embedding": self.vocab_size * self.hidden_size,
            "attention": per_token * (3 * self.qkv_param_tokens + self.proj_param_tokens),
            "ffn": per_token * self.ffn_param_tokens,
            "norm": 2 * self.hidden_size,
        }
        if not self.tie_word_embeddings:
            counts["head"] = self.vocab_size * self.hidden_size
        return counts

    def product_parameters(self) -> int:
        counts = self.parameter_counts()
        return counts["attention"] + counts["ffn"] + self.vocab_size * self.hidden_size


def _is_refused(total: object) -> bool:
    return isinstance(total, int | float) and total <= 0
