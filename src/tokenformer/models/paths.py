"""Which directory a user means by a path. No torch here."""

from __future__ import annotations

from pathlib import Path

from tokenformer.errors import TokenFormerError


def is_model_directory(path: Path) -> bool:
    """Whether ``path`` holds a ``config.json``."""
    return (path / "config.json").is_file()


def resolve_model_directory(path: Path | str) -> Path:
    """The model directory at ``path``: itself, or ``model/`` inside a run directory.

    Raises:
        TokenFormerError: neither is there; the message says what was found.
    """
    path = Path(path)
    if is_model_directory(path):
        return path
    if is_model_directory(path / "model"):
        return path / "model"
    expected = "expected a model directory (with config.json) or a run directory (with model/config.json)"
    if not path.exists():
        raise TokenFormerError(f"{path}: no such directory; {expected}")
    if not path.is_dir():
        raise TokenFormerError(f"{path}: a file; {expected}")
    if (path / "config.yaml").is_file():
        raise TokenFormerError(f"{path}: this run has not written its model/ yet; {expected}")
    raise TokenFormerError(f"{path}: holds neither; {expected}")
