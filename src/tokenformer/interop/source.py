"""What all conversions to our format share: the tokenizer beside the weights, and writing the model directory."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.interop.weights import Weights
from tokenformer.language.tokenizers import Tokenizer, load_tokenizer
from tokenformer.models.card import card_license, model_card
from tokenformer.models.config import DecoderConfig
from tokenformer.models.directory import save_model
from tokenformer.models.empty import empty_model


def tokenizer_beside(directory: Path, rows: int, field: str) -> Tokenizer | None:
    """The tokenizer in ``directory``, where it has a ``tokenizer.json``.

    Raises:
        TokenFormerError: an invalid tokenizer, or one with more ids than ``rows``, the number that ``field`` says.
    """
    if not (directory / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > rows:
        raise TokenFormerError(
            f"{directory / 'tokenizer.json'}: has {tokenizer.vocab_size} tokens, but {field} is {rows}"
        )
    return tokenizer


def license_beside(directory: Path) -> str | None:
    """The license that a model card in ``directory`` names; it goes on with the weights."""
    readme = directory / "README.md"
    return card_license(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None


def write_native(
    config: DecoderConfig,
    state: dict[str, Tensor],
    target: Path,
    *,
    origin: str,
    source: Path,
    config_name: str,
    weights: Weights,
    tokenizer: Tokenizer | None,
) -> None:
    """Write the model directory ``target``; its card names ``origin``, what was converted, with the hashes of files."""
    model = empty_model(config)
    model.load_state_dict(state, assign=True)
    facts: dict[str, object] = {
        "converted from": origin,
        "source": source.resolve().name,
        "configuration": f"`{config_name}`",
        **weights.provenance(),
    }
    card = model_card(config, {"Origin": facts}, license=license_beside(source))
    save_model(model, target, card=card, tokenizer=tokenizer)
