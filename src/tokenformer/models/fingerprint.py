"""A hash that tells models apart by their weights, however these are cut into files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open

from tokenformer.models.paths import weight_files


def weights_sha256(directory: Path | str) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor of a model directory, in the order of their names.

    Raises:
        TokenFormerError: there are no weights in it.
    """
    digest = hashlib.sha256()
    places = {}
    for path in weight_files(Path(directory)):
        with safe_open(path, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), path))
    for name in sorted(places):
        with safe_open(places[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
