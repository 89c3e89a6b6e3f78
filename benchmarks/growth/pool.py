"""Runs of a plan on several processes of one machine: what is missing, parents first, as long as time is left."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.growth.execute import Place, Result, execute
from benchmarks.growth.plan import Plan, Run, expand

RESULTS = "results.jsonl"


def read_results(path: Path) -> dict[str, Result]:
    """Results by id; of a run that was done again the last one."""
    if not path.is_file():
        return {}
    lines = path.read_text("utf-8").splitlines()
    return {result["id"]: result for result in map(json.loads, lines)}


class Pool:
    """Does what is missing of a plan. Every result is a line in ``OUT/results.jsonl`` as soon as it is there.

    ``workers`` processes live as long as the pool, so that each pays for importing torch once. With ``seconds`` no run
    is started that would, by the speed of its like so far, not be finished by then.
    """

    def __init__(
        self, plan: Plan, place: Place, *, workers: int, seconds: float = 1e9, threads: int = 1
    ) -> None:
        self.plan, self.place, self.workers, self.threads = plan, place, workers, threads
        self.began = time.monotonic()
        self.seconds = seconds
        self.runs = expand(plan)
        self.by_id = {run.id: run for run in self.runs}
        self.parents = {run.parent_id for run in self.runs}
        self.file = place.out / RESULTS
        self.results = read_results(self.file)
        self._speeds: dict[int, list[float]] = {}

    def missing(self) -> list[Run]:
        """Runs without a result of exactly this configuration, and parents of such whose checkpoint is gone."""
        missing = [run for run in self.runs if not self._is_done(run)]
        needed = {run.id for run in missing}
        for run in missing:
            at = run.parent_id
            while at is not None and at not in needed and not self._has_checkpoint(at):
                needed.add(at)
                at = self.by_id[at].parent_id
        return [run for run in self.runs if run.id in needed]

    def run(self) -> list[Run]:
        """Do them; returns the runs that were left out for want of time or of a parent."""
        self.place.out.mkdir(parents=True, exist_ok=True)
        waiting, left_out = self.missing(), []
        todo = {run.id for run in waiting}
        total, running = len(waiting), {}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=_prepare_worker, initargs=(self.threads,)
        ) as pool:
            while waiting or running:
                for run in list(waiting):
                    if len(running) >= self.workers:
                        break
                    if run.parent_id in todo:
                        continue
                    waiting.remove(run)
                    if self._has_no_parent(run) or self._is_too_late(run):
                        left_out.append(run)
                        todo.discard(run.id)
                        self.results.pop(run.id, None)
                    else:
                        running[self._submit(pool, run)] = run
                if not running:
                    continue
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    todo.discard(run.id)
                    self._keep(run, future.result())
                    print(self._line(run, total - len(waiting) - len(running), total), flush=True)
        return left_out

    def _submit(self, pool: ProcessPoolExecutor, run: Run) -> Future[Result]:
        parent = self.results[run.parent_id] if run.parent_id is not None else None
        return pool.submit(execute, run, self.plan, self.place, parent, is_parent=run.id in self.parents)

    def _keep(self, run: Run, result: Result) -> None:
        self.results[run.id] = result
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        if "total_flops" in result:
            speed = self._new_flops(run) / result["wall_seconds"]
            self._speeds.setdefault(result["parameters"], []).append(speed)

    def _new_flops(self, run: Run) -> float:
        parent = self.results.get(run.parent_id or "", {})
        return run.flops - float(parent.get("total_flops", 0.0))

    def _is_done(self, run: Run) -> bool:
        found = self.results.get(run.id)
        if found is None or found.get("failed"):
            return False
        same = run.model_dump(mode="json")
        return all(found.get(name) == value for name, value in same.items() if name != "round")

    def _has_checkpoint(self, run_id: str) -> bool:
        result = self.results.get(run_id, {})
        name = result.get("checkpoint")
        directory = self.place.run(self.by_id[run_id]) / "checkpoints"
        return name is not None and (directory / name).is_dir()

    def _has_no_parent(self, run: Run) -> bool:
        return run.parent_id is not None and not self._has_checkpoint(run.parent_id)

    def _is_too_late(self, run: Run) -> bool:
        left = self.began + self.seconds - time.monotonic()
        speeds: Iterable[float] = [
            speed for found in self._speeds.values() for speed in found[-self.workers :]
        ]
        expected = self._new_flops(run) / max(speeds) if speeds else 0.0  # the first ones compile
        return expected > left

    def _line(self, run: Run, number: int, total: int) -> str:
        result = self.results[run.id]
        scores = ", ".join(f"{name} {_number(result.get(name))}" for name in ("val", "test"))
        spent = f"{result.get('total_flops', 0) / 1e15:.3g} PFLOP, {result['wall_seconds']:.0f} s"
        at = time.monotonic() - self.began
        error = f"; {result['error']}" if "error" in result else ""
        return f"{at:4.0f} s {number}/{total} {run.id}: {scores}; {spent}{error}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


def _prepare_worker(threads: int) -> None:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # many workers compile at once
    import torch

    torch.set_num_threads(threads)
