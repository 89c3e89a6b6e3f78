"""State dicts of other programs: which file of a directory holds them, reading them, and checking every tensor.

Pickled files are opened with ``weights_only=True`` alone, so that nothing in them runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.files import sha256
from tokenformer.models.paths import INDEX, WEIGHTS, indexed_files

_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_DEEPSPEED = "mp_rank_*_model_states.pt"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float32 holds each of them exactly
_LISTED = 50


class Weights(NamedTuple):
    """A flat state dict, and the files it came from."""

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]

    @property
    def dtypes(self) -> str:
        """The dtypes of the tensors, e.g. ``float32``."""
        return ", ".join(sorted({_dtype_name(tensor) for tensor in self.tensors.values()}))

    def provenance(self) -> dict[str, object]:
        """File names with their SHA-256, for a model card."""
        return {f"`{path.name}`, SHA-256": f"`{sha256(path)}`" for path in self.files}


class NativeTensor(NamedTuple):
    """Where a tensor of another program goes, and the shape it must have there."""

    name: str
    shape: tuple[int, ...]


def read_weights(directory: Path) -> Weights:
    """The state dict in ``directory``, with the prefix ``module.`` taken off where every key has it.

    Looked for in this order: ``model.safetensors``, its index and shards, ``pytorch_model.bin`` (DeepSpeed's
    ``zero_to_fp32`` writes it), its index and shards, and DeepSpeed's ``mp_rank_00_model_states.pt``, whose ``module``
    is taken.

    Raises:
        TokenFormerError: no such file, a damaged one, one that holds more than tensors, or a part of a model.
    """
    files = _find_files(directory)
    tensors: dict[str, Tensor] = {}
    for path in files:
        part = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
        twice = [key for key in part if key in tensors]
        if twice:
            raise TokenFormerError(f"{path}: {_list(twice)}: also in another file of the same weights")
        tensors |= part
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return Weights(tensors, files)


def _find_files(directory: Path) -> tuple[Path, ...]:
    if not directory.is_dir():
        raise TokenFormerError(f"{directory}: no such directory; expected a checkpoint")
    for single, index in ((WEIGHTS, INDEX), (_BIN, _BIN_INDEX)):
        if (directory / single).is_file():
            return (directory / single,)
        if (directory / index).is_file():
            return tuple(indexed_files(directory / index))
    parts = sorted(directory.glob(_DEEPSPEED))
    if len(parts) > 1:
        raise TokenFormerError(
            f"{directory}: {len(parts)} files {_DEEPSPEED}, a model split over tensor-parallel ranks; "
            "expected the whole model in one state dict"
        )
    if parts:
        return (parts[0],)
    names = sorted(path.name for path in directory.iterdir())
    found = f"; found {', '.join(names[:_LISTED])}" if names else ", which is empty"
    layers = any(name.startswith("layer_") and name.endswith("model_states.pt") for name in names)
    hint = " (files layer_*: convert a pipeline checkpoint to one state dict first)" if layers else ""
    raise TokenFormerError(
        f"{directory}: no weights: expected {WEIGHTS}, {_BIN}, an index of either, or mp_rank_00_model_states.pt"
        f"{found}{hint}"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise TokenFormerError(f"{path}: not a whole safetensors file ({error})") from error
    return tensors


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{path}: damaged, or not a state dict of plain tensors ({_shorten(reason)})"
        if path.match(_DEEPSPEED):
            message += (
                "; DeepSpeed's zero_to_fp32.py, beside its checkpoints, writes a plain pytorch_model.bin"
            )
        raise TokenFormerError(message) from error
    if isinstance(weights, dict) and isinstance(
        weights.get("module"), dict
    ):  # beside optimiser, steps and so on
        weights = weights["module"]
    if not isinstance(weights, dict):
        raise TokenFormerError(f"{path}: found a {type(weights).__name__}, expected a flat state dict")
    for key, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise TokenFormerError(f"{path}: {key}: found a {type(tensor).__name__}, expected a tensor")
    return {str(key): tensor for key, tensor in weights.items()}


Buffer = Callable[[Tensor], bool]
"""Whether a stored buffer is what the configuration says."""


def check_weights(
    weights: Mapping[str, Tensor],
    expected: Mapping[str, NativeTensor],
    place: Path,
    *,
    buffers: Mapping[str, Buffer] | None = None,
) -> None:
    """Compare keys, shapes and dtypes with ``expected``, and look for NaN; ``place`` opens every error line.

    ``buffers`` may be there or not: what the configuration already says (rotary frequencies, a causal mask); one that
    says something else is a problem like any other.

    Raises:
        TokenFormerError: what is wrong, each tensor named.
    """
    buffers = buffers or {}
    problems = []
    missing = [key for key in expected if key not in weights]
    if missing:
        problems.append(f"{len(missing)} keys missing: {_list(missing)}")
    unexpected = [key for key in weights if key not in expected and key not in buffers]
    if unexpected:
        problems.append(f"{len(unexpected)} keys not expected: {_list(unexpected)}")
    present = {key: weights[key] for key in expected if key in weights}
    problems += [
        f"{key}: found shape {list(tensor.shape)}, expected {list(expected[key].shape)}"
        for key, tensor in present.items()
        if tuple(tensor.shape) != expected[key].shape
    ]
    problems += [
        f"{key}: found {_dtype_name(tensor)}, expected float32, bfloat16 or float16"
        for key, tensor in present.items()
        if tensor.dtype not in _DTYPES
    ]
    problems += [
        f"{key}: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} weights are NaN or infinite"
        for key, tensor in present.items()
        if tensor.dtype in _DTYPES and not torch.isfinite(tensor).all()
    ]
    problems += [
        f"{key}: not what the configuration says"
        for key, fits in buffers.items()
        if key in weights and not fits(weights[key])
    ]
    if problems:
        shown = problems[:_LISTED]
        if len(problems) > _LISTED:
            shown.append(f"... and {len(problems) - _LISTED} more problems")
        raise TokenFormerError("\n".join(f"{place}: {problem}" for problem in shown))


def rotary_frequencies(rotary_dim: int, theta: float) -> Buffer:
    """A check of stored ``inv_freq`` [rotary_dim / 2], in whatever precision it was stored."""
    expected = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)

    def fits(found: Tensor) -> bool:
        return found.shape == expected.shape and torch.allclose(
            found.double(), expected, rtol=1e-2, atol=1e-6
        )

    return fits


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _list(keys: list[str]) -> str:
    more = f", ... ({len(keys) - _LISTED} more)" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more


def _shorten(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
