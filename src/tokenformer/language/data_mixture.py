"""One data directory, or several with weights, as the source of one training stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.tokenizers import Tokenizer
from tokenformer.models.config import DecoderConfig


class Component(NamedTuple):
    """A data directory and its weight; ``name`` tells it apart in metrics."""

    name: str
    weight: float
    data: DataDirectory


class DataMixture:
    """Data directories of one tokenizer, with weights in any unit.

    A component is named after its directory, with as much of the path as makes it different from the others.

    Raises:
        TokenFormerError: there is none, a weight is not positive, a directory comes twice, or their tokenizers differ.
    """

    def __init__(self, parts: Sequence[tuple[DataDirectory, float]]) -> None:
        if not parts:
            raise TokenFormerError("data.mixture: is empty, expected at least one data directory")
        first = parts[0][0]
        for data, weight in parts:
            if not weight > 0:
                raise TokenFormerError(f"{data.path}: weight {weight}, expected a number above 0")
            if data.tokenizer.sha256 != first.tokenizer.sha256:
                raise TokenFormerError(
                    f"{data.path}: its tokenizer ({data.info.tokenizer}, hash {data.tokenizer.sha256[:16]}) is not "
                    f"that of {first.path} ({first.info.tokenizer}, hash {first.tokenizer.sha256[:16]}); a mixture "
                    "has one tokenizer"
                )
        names = _distinct_names([data.path for data, _ in parts])
        self.components = [
            Component(name, weight, data) for name, (data, weight) in zip(names, parts, strict=True)
        ]

    @classmethod
    def of(cls, data: DataDirectory | DataMixture) -> DataMixture:
        """``data``, alone in a mixture unless it is one."""
        return data if isinstance(data, DataMixture) else cls([(data, 1.0)])

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all components."""
        return self.components[0].data.tokenizer

    @property
    def shares(self) -> list[float]:
        """The part of the samples that each component has."""
        total = sum(component.weight for component in self.components)
        return [component.weight / total for component in self.components]

    def check_model(self, config: DecoderConfig, tokenizer_sha256: str | None) -> None:
        """:meth:`~tokenformer.language.data_directory.DataDirectory.check_model` of every component."""
        for component in self.components:
            component.data.check_model(config, tokenizer_sha256)


def _distinct_names(paths: list[Path]) -> list[str]:
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise TokenFormerError(f"data.mixture: {paths[index]} comes twice; add up its weights")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in resolved]
