"""What every decoder configuration has in common. No torch here: the command line reads configurations."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tokenformer.errors import TokenFormerError
from tokenformer.validation import Float, Int, StrictModel

PositiveInt = Annotated[Int, Field(gt=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]


class DecoderConfig(StrictModel):
    """Fields shared by the decoder language models. Axis letters: d ``hidden_size``, h heads, e = d / h.

    ``vocab_size`` is the number of rows stored (padding included). ``rotary_pct`` is the share of each head
    that is rotated: its first ``int(e * rotary_pct)`` features, an even number. ``logit_scale`` multiplies the
    logits. ``initializer`` names how fresh weights are drawn (``initialization.py`` of each architecture).
    """

    architecture: str
    class_name: ClassVar[str]

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    position_embedding: Literal["rotary", "none"] = "rotary"
    rotary_pct: Annotated[Float, Field(ge=0, le=1)] = 1.0
    rope_theta: PositiveFloat = 10000.0
    max_position_embeddings: PositiveInt = 2048
    layer_norm_eps: PositiveFloat = 1e-5
    logit_scale: PositiveFloat = 1.0
    tie_word_embeddings: bool = True
    initializer: Literal["fan_in", "published"] = "fan_in"

    @model_validator(mode="after")
    def _check_heads(self) -> DecoderConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.rotary_dim % 2:
            raise ValueError(
                f"rotary_pct {self.rotary_pct} rotates {self.rotary_dim} of {self.head_dim} head features; "
                "expected an even number, since features are rotated in pairs"
            )
        return self

    @property
    def head_dim(self) -> int:
        """e, the features of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Rotated features of each head; 0 without positions."""
        return int(self.head_dim * self.rotary_pct) if self.position_embedding == "rotary" else 0

    @abstractmethod
    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part, e.g. ``{"embedding": ..., "attention": ..., "ffn": ..., "norm": ...}``."""

    @abstractmethod
    def product_parameters(self) -> int:
        """Parameters that stand in a matrix product for every token: the head included (also when it is
        tied to the embedding), the embedding look-up, norms and biases not."""

    def num_parameters(self) -> int:
        """All stored parameters; a tied head counts once."""
        return sum(self.parameter_counts().values())

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs a token (forward and backward), at t = ``sequence_length``.

        6 per parameter in a product, plus attention counted causally: queries meet (t + 1) / 2 keys on
        average, 2 products of d multiply-adds each, tripled for the backward.
        """
        attention = 6 * self.num_hidden_layers * self.hidden_size * (sequence_length + 1)
        return 6 * self.product_parameters() + attention

    def to_json(self) -> dict[str, Any]:
        """The content of ``config.json``: Hugging Face's ``model_type`` and ``architectures``, then all fields."""
        fields = self.model_dump(mode="json", exclude={"architecture"})
        return {"model_type": self.architecture, "architectures": [f"{self.class_name}ForCausalLM"], **fields}

    @classmethod
    def load(cls, directory: Path | str) -> DecoderConfig:
        """Read ``config.json`` of a model directory, of this class or, called on the base, of any.

        Raises:
            TokenFormerError: missing or invalid file, another architecture, wrong fields.
        """
        from tokenformer.models.registry import load_config

        config = load_config(directory)
        if not isinstance(config, cls):
            raise TokenFormerError(
                f"{Path(directory) / 'config.json'}: model_type is '{config.architecture}', expected {cls.__name__}"
            )
        return config
