"""Checkpoints and data that are damaged, lost or have no room."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from drills.outcome import Outcome
from drills.processes import Trainer
from drills.subject import MODES, differences, write_data, write_recipe
from tokenformer.train.checkpoint.folder import list_checkpoints


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


_DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit flip": _flip_a_bit,
    "truncation": _truncate,
    "loss": Path.unlink,
}
_FILES = ("tensors/__0_0.distcp", "tensors/.metadata", "state.json", "manifest.json")


def damaged_checkpoints(folder: Path, trainer: Trainer) -> list[Outcome]:
    """Each kind of damage to each file of the newest checkpoint: found, named, and the one before it used."""
    data = write_data(folder)
    whole = folder / "whole"
    recipe = write_recipe(folder / "recipe.yaml", data)
    trainer.train(recipe, whole)
    outcomes = []
    for kind, damage in _DAMAGES.items():
        for name in _FILES:
            out = Path(shutil.copytree(whole, folder / f"{kind}-{Path(name).name}".replace(" ", "-")))
            newest, former = list_checkpoints(out)[-1], list_checkpoints(out)[-2]
            damage(newest / name)
            end = trainer.train(recipe, out)
            problems = [f"exit code {end.code}: {end.words}"] if end.code else differences(out, whole)
            if newest.name not in end.words or former.name not in end.words:
                problems.append(f"it said: {end.words!r}")
            outcomes.append(Outcome("damaged checkpoint", f"{kind} in {name}", problems))
    return outcomes


def lost_data(folder: Path, trainer: Trainer) -> list[Outcome]:
    """The training data disappear while a run is down: a clear refusal, and nothing lost once they are back."""
    data = write_data(folder)
    whole, out = folder / "whole", folder / "run"
    recipe = write_recipe(folder / "recipe.yaml", data)
    trainer.train(recipe, whole)
    trainer.train(recipe, out, kill_in_step=9)
    tokens = data / "train.bin"
    away = tokens.rename(folder / "away.bin")
    refused = trainer.train(recipe, out)
    away.rename(tokens)
    end = trainer.train(recipe, out)
    problems = [f"exit code {end.code}: {end.words}"] if end.code else differences(out, whole)
    if refused.code != 2 or str(tokens) not in refused.words:
        problems.append(f"without data: exit code {refused.code}: {refused.words!r}")
    return [Outcome("lost data", "train.bin away while the run is down", problems)]


def full_disk(folder: Path, trainer: Trainer) -> list[Outcome]:
    """A file system that is full in the middle of a run, written at once, by a thread and by a process."""
    data = write_data(folder)
    whole = folder / "whole"
    trainer.train(write_recipe(folder / "whole.yaml", data), whole)
    return [_full_disk(folder, trainer, data, whole, mode) for mode in MODES]


def _full_disk(folder: Path, trainer: Trainer, data: Path, whole: Path, mode: str | bool) -> Outcome:
    what = f"written by a {mode}" if mode else "written at once"
    place = folder / f"small-{mode}"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        return Outcome("full disk", what, [], skipped=f"no file system to fill: {mounted.stderr.strip()}")
    try:
        # every checkpoint is kept, so that the room runs out somewhere in the ladder
        section = {"every_steps": 1, "keep_last": 99, "asynchronous": mode, "when_busy": "wait"}
        recipe = write_recipe(folder / f"small-{mode}.yaml", data, checkpoint=section)
        refused = trainer.train(recipe, place / "run")
        problems = []
        if (
            refused.code != 2
            or "No space left on device" not in refused.words
            or "is whole" not in refused.words
        ):
            problems.append(f"exit code {refused.code}: {refused.words!r}")
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        end = trainer.train(recipe, place / "run")
        return Outcome(
            "full disk",
            what,
            problems
            + ([f"exit code {end.code}: {end.words}"] if end.code else differences(place / "run", whole)),
        )
    finally:
        subprocess.run(["umount", str(place)], check=True)
