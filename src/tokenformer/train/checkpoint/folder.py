"""The checkpoints of a run: where they lie, which of them go, which of them are whole. No torch here."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from tokenformer.errors import TokenFormerError
from tokenformer.train.checkpoint.manifest import DamagedCheckpointError, require_whole

_STEP_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_path(run: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of ``step``."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; each was complete when it got its name."""
    steps = {
        int(match.group(1)): path
        for path in (run / "checkpoints").glob("step-*")
        if (match := _STEP_NAME.fullmatch(path.name))
    }
    return [steps[step] for step in sorted(steps)]


def checkpoint_step(path: Path) -> int:
    """The step in the name of a run's checkpoint."""
    match = _STEP_NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match.group(1))


class WholeCheckpoint(NamedTuple):
    """``path``: the newest checkpoint that is whole, None where a run has none yet; ``damaged``: what is wrong with
    each newer one."""

    path: Path | None
    damaged: dict[Path, str]


def find_newest_whole(run: Path) -> WholeCheckpoint:
    """Look through a run's checkpoints, newest first, for one that is as it was written; reads its files.

    Raises:
        TokenFormerError: there are checkpoints, but none is whole; names what is wrong with each.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(list_checkpoints(run)):
        try:
            require_whole(path)
        except DamagedCheckpointError as error:
            damaged[path] = str(error)
        else:
            return WholeCheckpoint(path, damaged)
    if damaged:
        raise TokenFormerError(
            f"{run}: none of its checkpoints is whole:\n"
            + "\n".join(f"  {problem}" for problem in damaged.values())
            + "\nRestore one of them from a copy, or start again in another --out"
        )
    return WholeCheckpoint(None, {})


def set_aside(damaged: Path) -> Path:
    """Give a damaged checkpoint another name, so that its step can be saved again; it is kept to be looked at.

    Returns:
        The new path.
    """
    target = damaged.with_name(f"{damaged.name}.damaged")
    if target.exists():
        shutil.rmtree(target)
    return damaged.rename(target)


def prune_checkpoints(
    run: Path, keep_last: int, keep_every_steps: int | None = None, in_use: Collection[Path] = ()
) -> None:
    """Remove all but the newest ``keep_last`` checkpoints, those of steps that ``keep_every_steps`` divides and those
    ``in_use``."""
    for path in list_checkpoints(run)[:-keep_last]:
        milestone = keep_every_steps is not None and checkpoint_step(path) % keep_every_steps == 0
        if milestone or path in in_use:
            continue
        condemned = path.with_name(f".{path.name}.removed")
        path.rename(condemned)  # a half-removed checkpoint must not carry a checkpoint's name
        shutil.rmtree(condemned, ignore_errors=True)


def remove_remains(run: Path) -> None:
    """Remove what interrupted writing and pruning left; nothing may be writing meanwhile."""
    for remains in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(remains, ignore_errors=True)
