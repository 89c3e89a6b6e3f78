"""Runs of several processes: one is killed, hangs, gets a signal or a loss that is not a number; and other numbers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from drills.child import Kill, Orders
from drills.outcome import Outcome
from drills.processes import Trainer
from drills.subject import differences, write_data, write_recipe
from tokenformer.errors import LostRankError
from tokenformer.train.checkpoint.contents import read_checkpoint
from tokenformer.train.checkpoint.folder import list_checkpoints
from tokenformer.train.metrics import read_metrics

_TIMEOUT = 600.0
_TOLERANCE = 1e-5


def lost_ranks(folder: Path, runs: int, seed: int, device: str = "cpu") -> list[Outcome]:
    """``torchrun --max-restarts`` of two processes, one of which is killed at a random moment."""
    recipe = _recipe(folder, device)
    whole = folder / "whole"
    code, words = _torchrun(recipe, whole, None)
    if code:
        return [Outcome("lost rank", "undisturbed run", [f"exit code {code}: {words}"])]
    draw = random.Random(seed)
    outcomes = []
    for index in range(runs):
        out = folder / f"run-{index}"
        rank, step = draw.randrange(2), draw.randrange(1, 13)
        code, words = _torchrun(recipe, out, (rank, step, draw.uniform(0, 0.3)))
        problems = [f"exit code {code}: {words}"] if code else differences(out, whole)
        outcomes.append(Outcome("lost rank", f"{index}: rank {rank} of 2 killed after step {step}", problems))
    return outcomes


def other_numbers(folder: Path, trainer: Trainer) -> list[Outcome]:
    """Four processes until a signal reaches one of them, then two, then one: the curve is that of one process."""
    data = write_data(folder)
    recipe = write_recipe(folder / "recipe.yaml", data)
    whole, out = folder / "whole", folder / "run"
    trainer.train(recipe, whole)
    stops = (
        (4, 2, signal.SIGUSR1, "step 5"),  # rank 2 gets the signal in the fifth step of the process
        (2, 1, signal.SIGTERM, "step 10"),
    )
    problems = []
    for size, rank, number, step in stops:
        orders = [Orders(signal_step=4 if r == rank else None, signal_number=number) for r in range(size)]
        ends = trainer.train_ranks(recipe, out, orders)
        if any(end.code != 128 + number for end in ends):
            problems.append(f"{size} processes: exit codes {[end.code for end in ends]}: {ends[0].words}")
        elif f"after {step}" not in ends[0].words:
            problems.append(f"{size} processes: {ends[0].words!r}")
    end = trainer.train(recipe, out)
    problems += [f"exit code {end.code}: {end.words}"] if end.code else _unlike(out, whole)
    return [Outcome("other numbers", "4 processes, then 2, then 1", problems)]


def hung_rank(folder: Path, trainer: Trainer) -> list[Outcome]:
    """One of two processes sleeps in a step, or is killed while nobody watches over them."""
    return [absent_rank(folder / what.split()[-1], trainer, what) for what in _ABSENCES]


_ABSENCES = {
    "sleeps": (Orders(sleep_step=5), [LostRankError.exit_code] * 2, "waiting for rank 1"),
    "is killed": (
        Orders(kill=Kill("step", 5, 0.0)),
        [LostRankError.exit_code, -signal.SIGKILL],
        "lost rank 1",
    ),
}


def absent_rank(folder: Path, trainer: Trainer, what: str, device: str = "cpu") -> Outcome:
    """Rank 1 of two ``sleeps`` or ``is killed``: those that wait for it end and say so; the run goes on."""
    order, codes, words = _ABSENCES[what]
    recipe = _recipe(folder, device, timeout_seconds=20)
    ends = trainer.train_ranks(recipe, folder / "run", [Orders(), order])
    problems = []
    if [end.code for end in ends] != codes or not any(words in end.words for end in ends):
        problems.append(f"exit codes {[end.code for end in ends]}: {[end.words for end in ends]}")
    after = trainer.train_ranks(recipe, folder / "run", [Orders(), Orders()])
    problems += [f"then: {end.words}" for end in after if end.code]
    return Outcome("hung rank", f"rank 1 of 2 {what} in step 5", problems)


def sick_rank(folder: Path, trainer: Trainer, seed: int) -> list[Outcome]:
    """A loss that is not a number on one of two processes: both leave the update out, and stay alike."""
    data = write_data(folder)
    recipe = write_recipe(folder / "recipe.yaml", data)
    draw = random.Random(seed)
    step, rank = draw.randrange(1, 15), draw.randrange(2)
    orders = [Orders(nan_step=step if r == rank else None) for r in range(2)]
    ends = trainer.train_ranks(recipe, folder / "run", orders)
    problems = [f"exit code {end.code}: {end.words}" for end in ends if end.code]
    if not problems:
        checkpoint = read_checkpoint(list_checkpoints(folder / "run")[-1])
        if checkpoint.state.skipped_steps != 1:
            problems.append(f"skipped {checkpoint.state.skipped_steps} steps, expected 1")
        if not all(tensor.isfinite().all() for tensor in checkpoint.contents().tensors.values()):
            problems.append("the checkpoint is not finite")
        # all ranks alike: what two processes did together, one process with the same sick step does too
        trainer.train_ranks(recipe, folder / "one", [Orders(nan_step=step)])
        problems += _unlike(folder / "run", folder / "one")
    return [Outcome("sick rank", f"NaN on rank {rank} of 2 in step {step}", problems)]


def _recipe(folder: Path, device: str, **parallel: Any) -> Path:
    parallel |= {"device": device, "num_threads": 1}
    precision = {"deterministic": True, "compile": False}
    return write_recipe(folder / "recipe.yaml", write_data(folder), parallel=parallel, precision=precision)


def _unlike(run: Path, whole: Path) -> list[str]:
    """Where the losses of two runs differ by more than rounding, or their steps differ."""
    one, other = (
        {(line["stage"], line["step"]): line["loss"] for line in read_metrics(path) if "loss" in line}
        for path in (run, whole)
    )
    if one.keys() != other.keys():
        return ["metrics of other steps"]
    worst = max(abs((one[k] or 0) - (other[k] or 0)) / (abs(other[k] or 0) or 1) for k in other)
    return [f"loss off by {worst:.1e} of it"] if worst > _TOLERANCE else []


def _torchrun(recipe: Path, out: Path, kill: tuple[int, int, float] | None) -> tuple[int, str]:
    """Exit code and output; ``kill`` is a rank, the step to wait for, and how long after it (seconds)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=3", "-m", "tokenformer", "train", str(recipe), "--out", str(out), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        if kill is not None:
            rank, step, delay = kill
            _wait_for_step(out, step, process)
            time.sleep(delay)
            worker = _worker(process.pid, rank)
            if worker is not None:
                os.kill(worker, signal.SIGKILL)
        words, _ = process.communicate(timeout=_TIMEOUT)
    finally:
        process.terminate()
        process.wait()
    return process.returncode, words


def _wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "metrics.jsonl").is_file() and any(line["step"] >= step for line in read_metrics(out)):
            return
        time.sleep(0.02)


def _worker(launcher: int, rank: int) -> int | None:
    """The process that torchrun started for a rank; None when it is over."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in children:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment:
            return int(pid)
    return None
