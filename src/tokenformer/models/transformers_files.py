"""Files beside a model for Hugging Face's transformers; every model directory gets them, whoever writes it.

``configuration_tokenformer.py`` and ``modeling_tokenformer.py`` (named by ``auto_map`` in ``config.json``) let
``trust_remote_code=True`` find the installed package; ``tokenizer_config.json`` and ``generation_config.json`` say how
to read ``tokenizer.json`` and which ids end a text or stand for nothing. No torch and no transformers here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from tokenformer.files import write_json, write_text
from tokenformer.models.config import DecoderConfig

CONFIGURATION, MODELING = "configuration_tokenformer", "modeling_tokenformer"
_CLASSES = {"tokenformer": "TokenFormer", "transformer": "Transformer"}


class Tokenizer(Protocol):
    """What a model directory needs of a tokenizer; ``vocab_size`` counts real ids, those from there on are padding."""

    eos_token: str
    eos_token_id: int
    vocab_size: int

    def save(self, directory: Path) -> object:
        """Write ``tokenizer.json`` into ``directory``."""


def auto_map(model_type: str) -> dict[str, str]:
    """``auto_map`` of ``config.json``: transformers' ``Auto`` classes to ``file.class``; empty for an architecture that
    :mod:`tokenformer.huggingface` does not have."""
    name = _CLASSES.get(model_type)
    if name is None:
        return {}
    return {
        "AutoConfig": f"{CONFIGURATION}.{name}PretrainedConfig",
        "AutoModelForCausalLM": f"{MODELING}.{name}ForCausalLM",
    }


def write_auto_files(model_type: str, directory: Path) -> None:
    """Write the two files that ``auto_map`` names: they import the classes from the installed package, no more."""
    for place in auto_map(model_type).values():
        file, name = place.split(".")
        text = f"from tokenformer.huggingface import {name}\n\n__all__ = [{name!r}]\n".replace("'", '"')
        write_text(directory / f"{file}.py", text)


def write_tokenizer_files(config: DecoderConfig, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the tokenizer and what transformers asks beside it; padding ids are never generated."""
    tokenizer.save(directory)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eos_token,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", settings)
    end = tokenizer.eos_token_id
    generation: dict[str, object] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    padding = list(range(tokenizer.vocab_size, config.vocab_size))
    write_json(
        directory / "generation_config.json", generation | ({"suppress_tokens": padding} if padding else {})
    )
