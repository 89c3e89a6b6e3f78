"""Runs of a plan on several processes of one machine: what is missing, parents first, as long as time is left."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.growth.execute import Place, Result, execute
from benchmarks.growth.plan import Plan, Run, expand

RESULTS = "results.jsonl"


def read_results(path: Path) -> dict[str, Result]:
    """Results by id; of a run that was done again the last one."""
    if not path.is_file():
        return {}
    lines = path.read_text("utf-8").splitlines()
    return {result["id"]: result for result in map(json.loads, lines)}


class Work(NamedTuple):
    """A run, and the process that does it."""

    run: Run
    process: ProcessPoolExecutor


@dataclass
class Lane:
    """Processes on one GPU (None: whatever there is), from ``begins`` seconds on; ``running`` are at work, ``idle`` are
    not."""

    gpu: str | None = None
    begins: float = 0.0
    running: dict[Future[Result], Work] = field(default_factory=dict)
    idle: list[ProcessPoolExecutor] = field(default_factory=list)


class Pool:
    """Does what is missing of a plan. Every result is a line in ``OUT/results.jsonl`` as soon as it is there.

    ``workers`` processes for each lane live as long as the pool, so that each pays for importing torch once; only that
    of a failed run is replaced, as after an error of a GPU nothing works in it any more. With
    ``seconds`` no run is started that would not be finished by then, judged by the speed that its like has once
    everything is compiled; what still runs then is ended.
    """

    def __init__(
        self,
        plan: Plan,
        place: Place,
        *,
        workers: int,
        seconds: float = 1e9,
        lanes: Sequence[Lane] = (),
        threads: int = 1,
    ) -> None:
        self.plan, self.place, self.workers, self.threads = plan, place, workers, threads
        self.began = time.monotonic()
        self.seconds = seconds
        self.lanes = list(lanes) or [Lane()]
        self.runs = expand(plan)
        self.by_id = {run.id: run for run in self.runs}
        self.parents = {run.parent_id for run in self.runs}
        self.file = place.out / RESULTS
        self.results = read_results(self.file)
        self._speeds: dict[int, list[float]] = {}  # of a whole lane, by the number of parameters
        self._overheads: list[float] = []

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
        """Do them; returns the runs that were left out for want of time or of a parent, or ended."""
        self.place.out.mkdir(parents=True, exist_ok=True)
        waiting = self.missing()
        total = len(waiting)
        try:
            while True:
                self._start(waiting)
                running = [future for lane in self.lanes for future in lane.running]
                if not running:
                    return waiting
                for future in wait(running, timeout=2, return_when=FIRST_COMPLETED).done:
                    lane = next(lane for lane in self.lanes if future in lane.running)
                    work = lane.running.pop(future)
                    result = future.result()
                    if result.get("failed"):
                        work.process.shutdown(wait=False)
                    else:
                        lane.idle.append(work.process)
                    self._keep(work.run, result, len(lane.running) + 1)
                    left = len(waiting) + sum(len(lane.running) for lane in self.lanes)
                    print(self._line(work.run, total - left, total), flush=True)
                if self._left() < 0:
                    for process in multiprocessing.active_children():
                        process.kill()
                    return [*waiting, *self._at_work()]
        finally:
            for lane in self.lanes:
                for process in (*lane.idle, *(work.process for work in lane.running.values())):
                    process.shutdown(wait=False)

    def _at_work(self) -> list[Run]:
        return [work.run for lane in self.lanes for work in lane.running.values()]

    def _process(self, lane: Lane) -> ProcessPoolExecutor:
        """One that is idle, or a new one."""
        if lane.idle:
            return lane.idle.pop()
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(
            1, mp_context=context, initializer=_prepare_worker, initargs=(self.threads, lane.gpu)
        )

    def _start(self, waiting: list[Run]) -> None:
        """Give work to every process that is free."""
        at_work = {run.id for run in self._at_work()}
        for run in list(waiting):
            lane = self._free_lane()
            if lane is None:
                return
            if run.parent_id is not None and (
                run.parent_id in at_work | {other.id for other in waiting}
                or not self._has_checkpoint(run.parent_id)
            ):
                continue
            if self._needed(run, waiting, lane) > self._left():
                continue  # it is asked again: what is expected may change
            waiting.remove(run)
            parent = self.results[run.parent_id] if run.parent_id is not None else None
            process = self._process(lane)
            future = process.submit(
                execute, run, self.plan, self.place, parent, is_parent=run.id in self.parents
            )
            lane.running[future] = Work(run, process)

    def _free_lane(self) -> Lane | None:
        at = time.monotonic() - self.began
        free = [lane for lane in self.lanes if lane.begins <= at and len(lane.running) < self.workers]
        return min(free, key=lambda lane: len(lane.running), default=None)

    def _left(self) -> float:
        return self.began + self.seconds - time.monotonic()

    def _needed(self, run: Run, waiting: list[Run], lane: Lane) -> float:
        """Seconds until ``run`` would be finished, or, if it is only there for others, the nearest of them."""
        together = min(self.workers, len(lane.running) + len(waiting))
        seconds = self._expected(run, together)
        children = [other for other in waiting if other.parent_id == run.id]
        if run.group == "parents" and children:
            seconds += min(self._needed(child, waiting, lane) for child in children)
        return seconds

    def _expected(self, run: Run, together: int) -> float:
        """Of a run that shares its GPU with others."""
        known = [speed for found in self._speeds.values() for speed in found[-self.workers :]]
        alike = self._speeds.get(self._parameters(run), known)
        speed = median(alike) if alike else self.plan.speed
        overhead = median(self._overheads) if self._overheads else self.plan.overhead
        return overhead + self._new_flops(run) * together / speed

    def _parameters(self, run: Run) -> int:
        """Of a run that was done before; 0 where it is not known."""
        for found in self.results.values():
            if found["name"] == run.name or (run.model is not None and found.get("model") == run.model):
                return int(found["parameters"])
        return 0

    def _keep(self, run: Run, result: Result, together: int) -> None:
        self.results[run.id] = result
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        speed = result.get("flops_per_second")
        if speed is not None:
            self._speeds.setdefault(result["parameters"], []).append(speed * together)
            steps = self._new_flops(run) / speed
            self._overheads.append(max(0.0, result["wall_seconds"] - steps))

    def _new_flops(self, run: Run) -> float:
        parent = self.by_id.get(run.parent_id or "")
        return run.flops - (parent.flops if parent is not None else 0.0)

    def _is_done(self, run: Run) -> bool:
        found = self.results.get(run.id)
        if found is None or found.get("failed"):
            return False
        fields = {name: value for name, value in found.items() if name in Run.model_fields}
        done = Run.model_validate(fields | {"round": run.round})  # fields that came later have their defaults
        return done == run

    def _has_checkpoint(self, run_id: str) -> bool:
        result = self.results.get(run_id, {})
        name = result.get("checkpoint")
        directory = self.place.run(self.by_id[run_id]) / "checkpoints"
        return name is not None and (directory / name).is_dir()

    def _line(self, run: Run, number: int, total: int) -> str:
        result = self.results[run.id]
        scores = ", ".join(f"{name} {_number(result.get(name))}" for name in ("val", "test"))
        spent = f"{result.get('total_flops', 0) / 1e15:.3g} PFLOP, {result['wall_seconds']:.0f} s"
        if result.get("flops_per_second"):
            spent += f", {result['flops_per_second'] / 1e12:.0f} TFLOP/s"
        at = time.monotonic() - self.began
        error = f"; {result['error']}" if "error" in result else ""
        return f"{at:4.0f} s {number}/{total} {run.id}: {scores}; {spent}{error}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


def _prepare_worker(threads: int, gpu: str | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # many workers compile at once
    import torch

    torch.set_num_threads(threads)
