"""What saving costs the training: step times without checkpoints and with one every so many steps.

    python benchmarks/checkpoint.py --model 450M --every 50 --folder /data --json checkpoint.json

Sides, in turn within each round and over the same model and optimiser: ``none``; ``process``, as a run on a GPU does
by itself (copied to page-locked memory; written, checksummed and exported by processes beside it); ``thread``, the
same by threads of the training; ``at once``, where the training waits. Each round begins with a save and makes one
every so many steps; it ends with its last step, without waiting for what is still being written. As in a run, the
device is waited for before each save, and one that is due while the former is still being written is left out
(``--when-busy wait``: it waits). The first save, which takes the memory for the copies, is timed by itself.

Beside the step times it tells how many checkpoints were complete by the end of the rounds, how long writing and
exporting one took, and how fast the disk takes as many bytes without any of this.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from step_sides import SIZES, RandomTask, stage_config, tokenformer_config
from tokenformer.models.registry import build_model
from tokenformer.train.checkpoint import export, writer
from tokenformer.train.checkpoint.contents import TrainingCheckpoint
from tokenformer.train.checkpoint.folder import list_checkpoints
from tokenformer.train.checkpoint.writer import CheckpointWriter
from tokenformer.train.optimizer import named_state
from tokenformer.train.sections import CheckpointConfig
from tokenformer.train.state import TrainingState
from tokenformer.train.step import TrainStep
from train_step import random_batches

MODES = ("process", "thread", "at once")
POLICY = CheckpointConfig(keep_last=1)
WARM_UP = 5
FILES = 8  # as a large checkpoint is written


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    trainer = Trainer(arguments.model, device)
    print(
        f"{machine}, {os.cpu_count()} CPU cores, torch {torch.__version__}, {arguments.model}: "
        f"{trainer.parameters:,} parameters"
    )
    about = {"machine": machine, "cpu_cores": os.cpu_count(), "torch": torch.__version__}
    folders: dict[str, dict[str, Any]] = {}
    for place in arguments.folder:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            for found in measure(trainer, Path(folder), arguments):
                folders[str(place or folder)] = found
                if arguments.json:
                    written = about | {"arguments": vars(arguments) | {"json": None}, "folders": folders}
                    arguments.json.write_text(json.dumps(written, indent=2, default=str) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="450M")
    parser.add_argument("--every", type=int, default=50, help="steps between two saves")
    parser.add_argument("--steps", type=int, default=150, help="of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--when-busy", choices=("skip", "wait"), default="skip")
    parser.add_argument("--export", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--folder",
        type=Path,
        nargs="*",
        default=[None],
        help="where to save, one after the other; the system's temporary directory by default",
    )
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    return parser.parse_args()


class Trainer:
    """A model in training."""

    def __init__(self, name: str, device: torch.device) -> None:
        size = SIZES[name]
        self.device = device
        self.model = build_model(tokenformer_config(size, "l2_norm_gelu")).to(device)
        self.parameters = self.model.config.num_parameters()
        if device.type == "cuda":
            for block in self.model.blocks:
                block.compile(dynamic=False)
        self._step = TrainStep(self.model, RandomTask(), stage_config(size), device)  # type: ignore[arg-type]
        self._batches = cycle(list(random_batches(size)))
        self._steps = 0
        self.before_update: Callable[[], None] = lambda: None
        self._step.optimizer.register_step_pre_hook(lambda *_: self.before_update())
        for _ in range(WARM_UP):
            self.step()

    def step(self) -> None:
        self._step(self._batches, 0)
        self._steps += 1

    def checkpoint(self) -> TrainingCheckpoint:
        moments = named_state(self.model, self._step.optimizer)
        return TrainingCheckpoint(self.model, moments, TrainingState(step=self._steps))

    def mark(self) -> Any:
        """The moment at which the device has done what it was given so far."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, one: Any, other: Any) -> float:
        """Seconds from one mark to another."""
        return one.elapsed_time(other) / 1e3 if self.device.type == "cuda" else other - one

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Round(NamedTuple):
    """``seconds`` of all steps, saves included; ``steps``: of each; ``held_up``: of each save; how many saves were left
    out, and how many of the others were complete when the round was over."""

    seconds: float
    steps: list[float]
    held_up: list[float]
    left_out: int
    complete: int


def measure(trainer: Trainer, folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the rounds of one folder give, after each of them; prints as it goes."""
    print(f"\n{folder}", flush=True)
    wait = arguments.when_busy == "wait"
    with closing(Saver(trainer, folder, arguments.modes, arguments.export, wait=wait)) as saver:
        yield from take_turns(trainer, saver, folder, arguments)


def take_turns(
    trainer: Trainer, saver: Saver, folder: Path, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The sides, round after round."""
    about: dict[str, Any] = saver.first_saves()
    about["plain_write_gb_per_second"] = plain_write(folder, about["checkpoint_bytes"])
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    rounds: dict[str, list[Round]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for side in ["none", *arguments.modes]:
            rounds[side].append(one_round(trainer, saver, side, arguments.steps, arguments.every))
            found = summary(rounds[side], rounds["none"], saver.durations.get(side, {}))
            print(
                f"{side:8} " + ", ".join(f"{k} {v:.4g}" for k, v in found.items() if k != "rounds_ms"),
                flush=True,
            )
            about.setdefault("results", {})[side] = found
            yield about


class Saver:
    """A writer for each mode."""

    def __init__(self, trainer: Trainer, folder: Path, modes: list[str], export: bool, *, wait: bool) -> None:
        self._trainer = trainer
        self._folder = folder
        self._card = "A benchmark." if export else None
        self._wait = wait
        self._writers = {mode: CheckpointWriter(folder / mode, mode=mode) for mode in modes}  # type: ignore[arg-type]
        self.durations: dict[str, dict[str, list[float]]] = {}

    def first_saves(self) -> dict[str, Any]:
        """The first save of each mode; its times and size."""
        times: dict[str, Any] = {}
        for mode in self._writers:
            begin = time.perf_counter()
            self.save(mode)
            times[f"first_save_held_up_{mode.replace(' ', '_')}"] = round(time.perf_counter() - begin, 3)
            self.finish()
            times[f"first_save_complete_{mode.replace(' ', '_')}"] = round(time.perf_counter() - begin, 3)
        newest = list_checkpoints(self._folder / next(iter(self._writers)))[-1]
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
        self.durations.clear()
        return {"checkpoint_bytes": size, **times}

    def save(self, mode: str) -> bool:
        """Save, or leave it out where the former one is still being written."""
        trainer, saving = self._trainer, self._writers[mode]
        if not self._wait and saving.is_writing():
            return False
        trainer.wait()
        self._note_durations(mode)
        saving.write(trainer.checkpoint(), POLICY, self._card)
        trainer.before_update = saving.before_update
        return True

    def complete(self, mode: str) -> int:
        """How many checkpoints there are, or were before later ones took their place."""
        return len(self.durations.get(mode, {}).get("writing", ()))

    def finish(self) -> None:
        """Wait until nothing is being written or exported."""
        for saving in self._writers.values():
            saving.finish()

    def close(self) -> None:
        writer.write_contents, export.export_model = _write_contents, _export_model
        for saving in self._writers.values():
            saving.close()

    def _note_durations(self, mode: str) -> None:
        """Let the next checkpoint's writing and export be timed under the name of ``mode``."""
        notes = self.durations.setdefault(mode, {"writing": [], "exporting": []})
        writer.write_contents = timed(_write_contents, notes["writing"])
        export.export_model = timed(_export_model, notes["exporting"])


_write_contents, _export_model = writer.write_contents, export.export_model


def timed(function: Callable[..., Any], durations: list[float]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        result = function(*arguments, **options)
        durations.append(time.perf_counter() - begin)
        return result

    return call


def one_round(trainer: Trainer, saver: Saver, side: str, steps: int, every: int) -> Round:
    held_up, left_out, before = [], 0, saver.complete(side)
    saver.finish()
    trainer.wait()
    begin = time.perf_counter()
    marks = [trainer.mark()]
    for index in range(steps):
        if side != "none" and index % every == 0:
            due = time.perf_counter()
            if saver.save(side):
                held_up.append(time.perf_counter() - due)
            else:
                left_out += 1
        trainer.step()
        marks.append(trainer.mark())
    trainer.wait()
    seconds = time.perf_counter() - begin
    complete = saver.complete(side) - before
    return Round(seconds, [trainer.between(*pair) for pair in pairwise(marks)], held_up, left_out, complete)


def summary(rounds: list[Round], none: list[Round], durations: dict[str, list[float]]) -> dict[str, Any]:
    """Over all rounds: times of a step in ms, and what a save costs in seconds: ``held_up`` is how long the loop did
    not go on, ``cost`` all that the round took longer than one without saving."""
    steps = [1e3 * seconds for round_ in rounds for seconds in round_.steps]
    found = {
        "mean_ms": 1e3 * sum(round_.seconds for round_ in rounds) / len(steps),
        "median_ms": statistics.median(steps),
        "of_none": sum(round_.seconds for round_ in rounds) / sum(round_.seconds for round_ in none),
        "rounds_ms": [1e3 * round_.seconds / len(round_.steps) for round_ in rounds],
    }
    held_up = [seconds for round_ in rounds for seconds in round_.held_up]
    if held_up:
        longer = sum(one.seconds - other.seconds for one, other in zip(rounds, none, strict=True))
        found |= {
            "saves": len(held_up),
            "left_out": sum(round_.left_out for round_ in rounds),
            "complete_in_time": sum(round_.complete for round_ in rounds),
            "held_up": statistics.median(held_up),
            "held_up_longest": max(held_up),
            "cost": longer / len(held_up),
        }
        found |= {name: statistics.median(times) for name, times in durations.items() if times}
    return found


def plain_write(folder: Path, size: int) -> dict[str, float]:
    """GB/s at which files of ``size`` bytes in all are written to ``folder`` and brought to the disk: by one thread,
    and by several at once."""
    block = os.urandom(64 << 20)

    def write(path: Path, left: int) -> None:
        with path.open("wb") as file:
            while left > 0:
                left -= file.write(block[: min(left, len(block))])
            file.flush()
            os.fsync(file.fileno())

    found = {}
    for files in (1, FILES):
        paths = [folder / f"plain-{index}" for index in range(files)]
        begin = time.perf_counter()
        with ThreadPoolExecutor(files) as pool:
            list(pool.map(write, paths, [size // files] * files))
        found[f"{files} files"] = round(size / 1e9 / (time.perf_counter() - begin), 3)
        for path in paths:
            path.unlink()
    return found


if __name__ == "__main__":
    main()
