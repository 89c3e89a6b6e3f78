"""Names to architectures. Importing this imports no torch; ``build_model`` does."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_json
from tokenformer.models.config import DecoderConfig
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.validation import nearest, validate

if TYPE_CHECKING:
    from tokenformer.models.base import LanguageModel


class Architecture(NamedTuple):
    """A configuration class, and where its model lives: ``module:class``, imported when it is built."""

    config: type[DecoderConfig]
    model: str


ARCHITECTURES = {
    "tokenformer": Architecture(TokenFormerConfig, "tokenformer.models.tokenformer.model:TokenFormer"),
    "transformer": Architecture(TransformerConfig, "tokenformer.models.transformer.model:Transformer"),
}

ModelConfig = Annotated[TokenFormerConfig | TransformerConfig, Field(discriminator="architecture")]
"""The ``model`` section of a run, chosen by ``architecture``."""

_HUGGING_FACE_FIELDS = (
    "model_type",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
)


def build_model(config: DecoderConfig, *, seed: int = 0) -> LanguageModel:
    """A model with fresh weights (float32, CPU) drawn from ``seed`` alone.

    Raises:
        TokenFormerError: no model class is registered for this configuration.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    model: LanguageModel = model_class(config.architecture)(config, generator=generator)
    return model


def model_class(architecture: str) -> Any:
    """The model class of an architecture, imported now."""
    module, name = _find(architecture, "architecture").model.split(":")
    return getattr(import_module(module), name)


def load_config(directory: Path | str) -> DecoderConfig:
    """Read ``config.json`` of a model directory.

    Raises:
        TokenFormerError: missing or invalid file, unknown ``model_type``, wrong fields.
    """
    path = Path(directory) / "config.json"
    values = read_json(path, "the configuration of a model directory")
    return parse_config(values, source=str(path))


def parse_config(values: dict[str, Any], *, source: str) -> DecoderConfig:
    """Configuration from the content of a ``config.json``; ``source`` opens error messages."""
    if "model_type" not in values:
        raise TokenFormerError(f"{source}: model_type: missing, expected one of {', '.join(ARCHITECTURES)}")
    architecture = _find(str(values["model_type"]), f"{source}: model_type")
    fields = {name: value for name, value in values.items() if name not in _HUGGING_FACE_FIELDS}
    return validate(architecture.config, fields, source=source)


def _find(name: str, place: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise TokenFormerError(f"{place}: '{name}' is not a known architecture{nearest(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]
