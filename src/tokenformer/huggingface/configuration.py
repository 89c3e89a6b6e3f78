"""Our configurations as transformers' ``PretrainedConfig``; ``config.json`` stays that of a model directory."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers
from transformers import PretrainedConfig

from tokenformer.models.config import DecoderConfig
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.models.transformers_files import auto_map
from tokenformer.validation import validate

_PARAMETER_TOKENS = {
    "qkv_param_tokens",
    "proj_param_tokens",
    "ffn_param_tokens",
    "param_token_groups",
    "tau",
    "growth_history",
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class NativeConfig(PretrainedConfig):
    """All fields of ``native_class`` as attributes, defaults filled in, beside those of every ``PretrainedConfig``.

    Raises:
        TokenFormerError: missing or wrong fields of the model.
    """

    native_class: ClassVar[type[DecoderConfig]]
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    has_no_defaults_at_init: ClassVar[bool] = True

    def __init__(self, **kwargs: Any) -> None:
        names = _field_names(self.native_class)
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        native = validate(self.native_class, given, source=f"{type(self).__name__}")
        fields = native.model_dump(mode="json", include=names)
        super().__init__(tie_word_embeddings=fields.pop("tie_word_embeddings"), **kwargs)
        for name, value in fields.items():
            setattr(self, name, value)

    def native(self) -> DecoderConfig:
        """The configuration of our model.

        Raises:
            TokenFormerError: a field was set to something that cannot be.
        """
        fields = {name: getattr(self, name) for name in _field_names(self.native_class)}
        return validate(self.native_class, fields, source=type(self).__name__)

    def follow(self, native: DecoderConfig) -> None:
        """Take over what the model's own configuration says of parameter tokens, which can change in place."""
        for name, value in native.model_dump(mode="json", include=_PARAMETER_TOKENS).items():
            setattr(self, name, value)

    def to_diff_dict(self) -> dict[str, Any]:
        """What ``save_pretrained`` writes: the ``config.json`` of a model directory, ``auto_map`` included."""
        values = self.native().to_json() | {"auto_map": auto_map(self.model_type)}
        values |= {name: getattr(self, name) for name in _TOKEN_IDS if getattr(self, name, None) is not None}
        if self.dtype is not None:
            values["dtype"] = str(self.dtype).removeprefix("torch.")
        return values | {"transformers_version": transformers.__version__}

    def _get_non_default_generation_parameters(self) -> dict[str, Any]:
        """None: transformers 4 would make a configuration without fields to compare with. (Version 5 does not ask.)"""
        return {}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: ``auto_map`` names files that import this class, and no source is copied beside a model."""


def _field_names(native_class: type[DecoderConfig]) -> set[str]:
    return set(native_class.model_fields) - {"architecture"}


class TokenFormerPretrainedConfig(NativeConfig):
    """Of a TokenFormer: the fields of :class:`~tokenformer.models.tokenformer.config.TokenFormerConfig`."""

    model_type = "tokenformer"
    native_class = TokenFormerConfig

    def __init__(self, **fields: Any) -> None:  # transformers 5 replaces one that is inherited
        super().__init__(**fields)


class TransformerPretrainedConfig(NativeConfig):
    """Of a Transformer: the fields of :class:`~tokenformer.models.transformer.config.TransformerConfig`."""

    model_type = "transformer"
    native_class = TransformerConfig

    def __init__(self, **fields: Any) -> None:  # transformers 5 replaces one that is inherited
        super().__init__(**fields)
