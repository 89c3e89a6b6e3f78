"""A hash that tells models apart by their weights, however these are cut into files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn, uint8

from tokenformer.models.paths import weight_files


def weights_sha256(directory: Path | str) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor of a model directory, in the order of their names.

    Raises:
        TokenFormerError: there are no weights in it.
    """
    return _sha256(_stored(Path(directory)))


def model_sha256(model: nn.Module) -> str:
    """The same of a model in memory: that of the directory that it would be saved to."""
    return _sha256(sorted(model.state_dict().items()))


def _stored(directory: Path) -> Iterator[tuple[str, Tensor]]:
    places = {}
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), path))
    for name in sorted(places):
        with safe_open(places[name], framework="pt") as file:
            yield name, file.get_tensor(name)


def _sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(uint8).numpy().data)
    return digest.hexdigest()
