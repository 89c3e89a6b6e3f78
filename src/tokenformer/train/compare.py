"""Whether a run may go on from a checkpoint: everything that decides the result must be as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tokenformer.errors import TokenFormerError
from tokenformer.train.config import RunConfig

DataIdentities = Mapping[str, Mapping[str, str | int]]
"""Of data directories, by path."""

_DECISIVE = (
    "model",
    "init_from",
    "adapter",
    "data",
    "optimizer",
    "schedule",
    "stages",
    "steps",
    "tokens",
    "seed",
)
_FREE_IN_DATA = ("data.micro_batch_size", "data.num_workers")
_FREE_IN_STAGES = (
    "name",
    "precision",
    "activation_checkpointing",
    "stability",
    "checkpoint",
    "evaluation",
    "logging",
)


def require_same_run(former: RunConfig, current: RunConfig, checkpoint: str) -> None:
    """Refuse to go on with a configuration whose result would be another.

    Device, precision, stability, micro-batches, data workers, checkpoints, evaluation and logging may change.

    Raises:
        TokenFormerError: names each field that differs, with both values.
    """
    before, now = dict(_decisive_fields(former)), dict(_decisive_fields(current))
    lines = [
        f"  {name}: {before.get(name)!r} in the checkpoint, {now.get(name)!r} now"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if lines:
        raise TokenFormerError(
            f"{checkpoint}: cannot go on, the configuration has changed:\n" + "\n".join(lines) + "\n"
            "Put these back, or train to another --out (with init_from to build on this checkpoint)"
        )


def require_same_data(former: DataIdentities, current: DataIdentities, checkpoint: str) -> None:
    """Refuse to go on with data directories that are others than they were, at the same paths.

    Raises:
        TokenFormerError: names each directory and what differs, with both values.
    """
    lines = [
        f"  {path}: {name}: {value!r} in the checkpoint, {current[path].get(name)!r} now"
        for path in former.keys() & current.keys()
        for name, value in former[path].items()
        if current[path].get(name) != value
    ]
    if lines:
        raise TokenFormerError(
            f"{checkpoint}: cannot go on, the data have changed:\n" + "\n".join(sorted(lines)) + "\n"
            "Put them back, or train to another --out (with init_from to build on this checkpoint)"
        )


def _decisive_fields(config: RunConfig) -> Iterator[tuple[str, Any]]:
    values = config.model_dump(mode="json", include=set(_DECISIVE))
    if config.stages is not None:
        values["stages"] = [
            stage.model_dump(mode="json", exclude_unset=True, exclude=set(_FREE_IN_STAGES))
            for stage in config.stages
        ]
    for name, value in _flatten(values, ""):
        if value is not None and not name.endswith(_FREE_IN_DATA):
            yield name, value


def _flatten(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for index, inner in enumerate(value):
            yield from _flatten(inner, f"{place}.{index}")
    else:
        yield place, value
