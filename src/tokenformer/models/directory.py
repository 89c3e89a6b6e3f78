"""Model directories: ``config.json``, safetensors weights, ``tokenizer.json``, a model card, and what transformers asks
beside them. Never pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.files import new_directory, write_json, write_text
from tokenformer.models.base import LanguageModel
from tokenformer.models.card import model_card
from tokenformer.models.empty import empty_model
from tokenformer.models.hub import local_or_hub
from tokenformer.models.paths import weight_files
from tokenformer.models.registry import load_config
from tokenformer.models.transformers_files import (
    Tokenizer,
    auto_map,
    write_auto_files,
    write_tokenizer_files,
)

MAX_SHARD_SIZE = "5GB"
_SHOWN = 6  # names listed in an error
Shapes = dict[str, tuple[int, ...]]


def save_model(
    model: LanguageModel,
    directory: Path | str,
    *,
    card: str | None = None,
    tokenizer: Tokenizer | Path | None = None,
    replace: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write a model directory; it appears when complete.

    Args:
        model: any registered model; weights keep their dtype.
        directory: the output; refused when it holds something, unless ``replace``.
        card: the text of ``README.md``; by default one made from the configuration.
        tokenizer: a tokenizer, or the path of a ``tokenizer.json`` to copy.
        replace: exchange an existing directory.
        max_shard_size: bytes of one weight file, or e.g. ``"5GB"``.

    Returns:
        The directory.

    Raises:
        TokenFormerError: the directory is taken, the weights are not those that the configuration says (a layer
            was changed by itself), the tokenizer file is missing, or the disk refuses.
    """
    directory = Path(directory)
    expected = _shapes(empty_model(model.config))
    _compare(f"{directory}: the weights do not fit the model's configuration", expected, _shapes(model))
    if isinstance(tokenizer, Path) and not tokenizer.is_file():
        raise TokenFormerError(f"{tokenizer}: no such file; expected a tokenizer.json")
    with new_directory(directory, replace=replace) as scratch:
        model_type = model.config.architecture
        found_by = {"auto_map": auto_map(model_type)} if auto_map(model_type) else {}
        write_json(scratch / "config.json", model.config.to_json() | found_by)
        write_auto_files(model_type, scratch)
        save_weights(model.state_dict(), scratch, max_shard_size=max_shard_size)
        if isinstance(tokenizer, Path):
            shutil.copyfile(tokenizer, scratch / "tokenizer.json")
        elif tokenizer is not None:
            write_tokenizer_files(model.config, tokenizer, scratch)
        write_text(scratch / "README.md", card or model_card(model.config))
    return directory


def save_weights(
    weights: Mapping[str, Tensor], directory: Path, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write ``model.safetensors``, or shards with their index, into ``directory``.

    Raises:
        TokenFormerError: the file could not be written.
    """
    from huggingface_hub import save_torch_state_dict

    try:
        save_torch_state_dict(
            {name: tensor.detach().contiguous() for name, tensor in weights.items()},
            directory,
            max_shard_size=max_shard_size,
            metadata={"format": "pt"},
        )
    except SafetensorError as error:
        raise TokenFormerError(f"{directory}: the weights could not be written ({error})") from error


def load_model(
    directory: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """Read a model directory, in evaluation mode.

    Args:
        directory: as :func:`save_model` writes it; or, as a string, ``owner/name`` on the Hugging Face hub.
        device: where the weights go.
        dtype: what they are converted to; as stored by default.
        revision: on the hub, a branch, tag or commit.

    Raises:
        TokenFormerError: missing or corrupt files; tensors missing, unexpected, of another shape than
            ``config.json`` says or not of a floating-point dtype; a device that cannot be used; the hub cannot be
            reached or has no such model.
    """
    _require_device(device)
    directory = local_or_hub(directory, revision=revision)
    model = empty_model(load_config(directory))
    opening = f"{directory}: the weights do not fit config.json"
    weights = read_tensors(weight_files(directory), _shapes(model), opening, device=device, dtype=dtype)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _require_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TokenFormerError(f"device: '{device}' cannot be used ({str(error).splitlines()[0]})") from error


def _shapes(model: LanguageModel) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def read_tensors(
    files: Sequence[Path],
    expected: Shapes,
    opening: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors named in ``expected``, checked before any is read.

    Args:
        files: safetensors.
        expected: names and shapes of all tensors that must be in them.
        opening: begins the message where others are found.
        device: where they go.
        dtype: what they are converted to; as stored by default.

    Raises:
        TokenFormerError: a damaged file; tensors missing, unexpected, of another shape or not of floats.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        with _open(path, "cpu") as file:
            found.update((name, tuple(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    _compare(opening, expected, found)
    weights: dict[str, Tensor] = {}
    for path in files:
        with _open(path, str(device)) as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    raise TokenFormerError(
                        f"{path}: {name}: found {str(tensor.dtype).removeprefix('torch.')} numbers, expected floats"
                    )
                weights[name] = tensor if dtype is None else tensor.to(dtype)
    return weights


def _open(path: Path, device: str) -> safe_open:
    try:
        return safe_open(path, framework="pt", device=device)
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise TokenFormerError(f"{path}: not a whole safetensors file ({error})") from error


def _compare(opening: str, expected: Shapes, found: Shapes) -> None:
    problems = [
        *_listed("missing tensors", (name for name in expected if name not in found)),
        *_listed("unexpected tensors", (name for name in found if name not in expected)),
        *_listed(
            "wrong shapes",
            (
                f"{name}: found {list(found[name])}, expected {list(shape)}"
                for name, shape in expected.items()
                if name in found and found[name] != shape
            ),
        ),
    ]
    if problems:
        raise TokenFormerError(f"{opening}; " + "; ".join(problems))


def _listed(title: str, names: Iterator[str]) -> list[str]:
    listed = list(names)
    if not listed:
        return []
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return [f"{title}: {', '.join(listed[:_SHOWN])}{more}"]
