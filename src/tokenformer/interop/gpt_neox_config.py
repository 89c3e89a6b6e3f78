"""``config.json`` of GPT-NeoX and Pythia models in transformers' format, and the Transformer it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_json
from tokenformer.models.config import PositiveFloat, PositiveInt
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.validation import StrictModel, validate

_MEANING = "the configuration of a GPT-NeoX model"
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_WRITTEN_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


class GPTNeoXConfig(StrictModel):
    """What decides the function; the defaults are transformers', which leaves out of a file what equals them."""

    vocab_size: PositiveInt = 50432
    hidden_size: PositiveInt = 6144
    num_hidden_layers: PositiveInt = 44
    num_attention_heads: PositiveInt = 64
    intermediate_size: PositiveInt = 24576
    hidden_act: Literal["gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"] = "gelu"
    max_position_embeddings: PositiveInt = 2048
    layer_norm_eps: PositiveFloat = 1e-5
    rotary_pct: Annotated[float, Field(gt=0, le=1)] = 0.25
    rotary_emb_base: PositiveFloat = 10000.0
    tie_word_embeddings: bool = False
    use_parallel_residual: bool = True
    attention_bias: bool = True

    def to_native(self, source: str, *, use_bias: bool) -> TransformerConfig:
        """The same model in our words; ``use_bias`` of all projections."""
        fields = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": self.intermediate_size,
            "hidden_act": _ACTIVATIONS[self.hidden_act],
            "use_bias": use_bias,
            "use_parallel_residual": self.use_parallel_residual,
            "layer_norm_affine": True,
            "position_embedding": "rotary",
            "rotary_pct": self.rotary_pct,
            "rope_theta": self.rotary_emb_base,
            "max_position_embeddings": self.max_position_embeddings,
            "layer_norm_eps": self.layer_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer": "published",
        }
        return validate(TransformerConfig, fields, source=source)

    @classmethod
    def from_native(cls, config: TransformerConfig, place: str) -> GPTNeoXConfig:
        """The configuration to write for ``config``, which has no layers that GPT-NeoX lacks.

        Raises:
            TokenFormerError: GPT-NeoX computes something else, with every reason.
        """
        if config.rotary_dim == 0:
            raise TokenFormerError(
                f"{place}: cannot be written as GPT-NeoX: no rotary positions (position_embedding "
                f"'{config.position_embedding}', {config.rotary_dim} rotated features)"
            )
        fields = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.mlp_size,
            "hidden_act": _WRITTEN_ACTIVATIONS[config.hidden_act],
            "max_position_embeddings": config.max_position_embeddings,
            "layer_norm_eps": config.layer_norm_eps,
            "rotary_pct": config.rotary_pct,
            "rotary_emb_base": config.rope_theta,
            "tie_word_embeddings": config.tie_word_embeddings,
            "use_parallel_residual": config.use_parallel_residual,
            "attention_bias": config.use_bias,
        }
        return validate(cls, fields, source=place)

    def to_json(self) -> dict[str, Any]:
        """The content of ``config.json``, with the rotary fields as both transformers 4 and 5 read them."""
        rope = {
            "rope_type": "default",
            "rope_theta": self.rotary_emb_base,
            "partial_rotary_factor": self.rotary_pct,
        }
        opening = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
        return {**opening, **self.model_dump(), "rope_parameters": rope}


def read_gpt_neox_config(path: Path) -> GPTNeoXConfig:
    """The configuration in ``path``. Fields of training (dropout, ``initializer_range``) are passed over.

    Raises:
        TokenFormerError: missing or broken file, another model type, wrong fields, scaled rotary positions.
    """
    values = read_json(path, _MEANING)
    found = values.get("model_type")
    if found != "gpt_neox":
        raise TokenFormerError(f"{path}: model_type: found {found!r}, expected 'gpt_neox'")
    fields = {name: values[name] for name in GPTNeoXConfig.model_fields if name in values}
    return validate(GPTNeoXConfig, fields | _rotary(values, path), source=str(path))


def _rotary(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """``rotary_pct`` and ``rotary_emb_base`` where transformers 5 wrote them as ``rope_parameters``."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise TokenFormerError(f"{path}: rope_parameters: found {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise TokenFormerError(
            f"{path}: rope_parameters: found rope_type '{kind}'; expected 'default', positions that are not scaled"
        )
    names = {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"}
    found = {ours: rope[theirs] for theirs, ours in names.items() if theirs in rope}
    for name, value in found.items():
        if name in values and values[name] != value:
            raise TokenFormerError(f"{path}: {name}: found {values[name]}, but rope_parameters say {value}")
    return found
