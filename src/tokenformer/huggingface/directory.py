"""What a saved model has beside transformers' own files: the card, and the files that ``auto_map`` names."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from tokenformer.files import write_text
from tokenformer.huggingface.configuration import NativeConfig
from tokenformer.models.card import card_license, model_card
from tokenformer.models.transformers_files import write_auto_files

_PLACEHOLDER = "[More Information Needed]"  # of the card that push_to_hub makes up where the hub has none


def write_beside(config: NativeConfig, directory: Path) -> None:
    """Write the ``auto_map`` files, and ``README.md`` where there is none."""
    write_auto_files(config.model_type, directory)
    if not (directory / "README.md").exists():
        write_text(directory / "README.md", _card(config))


def keep_card(config: NativeConfig, directory: Path) -> None:
    """Put our card in the place of one without content, whose tags stay."""
    readme = directory / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else _PLACEHOLDER
    if _PLACEHOLDER not in text:
        return
    card = ModelCard(_card(config))
    known, added = (data.to_dict().get("tags") or [] for data in (card.data, ModelCard(text).data))
    card.data["tags"] = [*known, *(tag for tag in added if tag not in known)]
    write_text(readme, str(card))


def _card(config: NativeConfig) -> str:
    origin: dict[str, object] = {"saved by": "`save_pretrained` of transformers"}
    license = None
    if config.name_or_path:
        source = Path(config.name_or_path)
        origin["loaded from"] = source.name
        readme = source / "README.md"
        license = (
            card_license(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None
        )
    return model_card(config.native(), {"Origin": origin}, license=license)
