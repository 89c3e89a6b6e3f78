"""Which directory a user means by a path, and which files it must hold. No torch here."""

from __future__ import annotations

from pathlib import Path

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_json
from tokenformer.models.hub import is_hub_name

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_model_directory(path: Path) -> bool:
    """Whether ``path`` holds a ``config.json``."""
    return (path / "config.json").is_file()


def resolve_model_directory(path: Path | str) -> Path:
    """The model directory at ``path``: itself, or ``model/`` inside a run directory.

    Raises:
        TokenFormerError: neither is there; the message says what was found.
    """
    path = Path(path)
    if (path / "state.json").is_file():
        raise TokenFormerError(
            f"{path}: a training checkpoint; expected a model directory or a run directory "
            "(whose model/ is the newest export)"
        )
    if is_model_directory(path):
        return path
    if is_model_directory(path / "model"):
        return path / "model"
    expected = "expected a model directory (with config.json) or a run directory (with model/config.json)"
    if not path.exists():
        raise TokenFormerError(f"{path}: no such directory; {expected}{_from_hub(path)}")
    if not path.is_dir():
        raise TokenFormerError(f"{path}: a file; {expected}")
    if (path / "adapter_config.json").is_file() or (path / "adapter").is_dir():
        raise TokenFormerError(
            f"{path}: an adapter; {expected}: its base, with the adapter as --adapter {path}"
        )
    if (path / "config.yaml").is_file():
        raise TokenFormerError(f"{path}: this run has not written its model/ yet; {expected}")
    raise TokenFormerError(f"{path}: holds neither; {expected}")


def _from_hub(path: Path) -> str:
    if not is_hub_name(str(path)):
        return ""
    return f"; if that is a model of the Hugging Face hub, fetch it first: hf download {path} --local-dir DIR"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, one or several.

    Raises:
        TokenFormerError: none there, or a shard that the index names is missing or lies elsewhere.
    """
    single, index = directory / WEIGHTS, directory / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        raise TokenFormerError(
            f"{directory}: found neither {WEIGHTS} nor {INDEX}; expected a model directory"
        )
    return indexed_files(index)


def indexed_files(index: Path) -> list[Path]:
    """The files that an index of sharded weights (``*.index.json``) names.

    Raises:
        TokenFormerError: a damaged index, or a shard that is missing or lies elsewhere.
    """
    directory = index.parent
    weight_map = read_json(index, "the index of sharded weights").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TokenFormerError(f"{index}: weight_map: expected an object of tensor names and their files")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise TokenFormerError(f"{index}: shard '{name}' lies outside the model directory")
        if not (directory / name).is_file():
            raise TokenFormerError(f"{directory / name}: missing, but named in {index.name}")
    return [directory / name for name in names]
