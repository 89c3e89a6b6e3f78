"""Runs killed with SIGKILL at random moments and started again until they are done."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from drills.child import PHASES, Kill
from drills.outcome import Outcome
from drills.processes import Trainer
from drills.subject import MODES, differences, samples_of_steps, write_data, write_recipe

_KILLS_OF_A_RUN = (1, 2, 3)


def killed_runs(folder: Path, trainer: Trainer, runs: int, seed: int) -> list[Outcome]:
    """``runs`` ladders, each killed one to three times: in a step, a checkpoint, an export and a growth in turns. Their
    checkpoints are written at once, by a thread and by a process in turns. Each must end as one never disturbed.

    The moment is drawn from ``seed`` over how long the phase took in the undisturbed run.
    """
    data = write_data(folder)
    whole = folder / "whole"
    recipe = write_recipe(folder / "whole.yaml", data)
    trainer.train(recipe, whole)
    durations = _durations(whole.with_name("whole.durations-0"))
    draw = random.Random(seed)
    return [_killed_run(trainer, folder, data, index, whole, durations, draw) for index in range(runs)]


def _killed_run(
    trainer: Trainer,
    folder: Path,
    data: Path,
    index: int,
    whole: Path,
    durations: dict[str, list[float]],
    draw: random.Random,
) -> Outcome:
    out = folder / f"run-{index}"
    recipe = write_recipe(
        folder / f"run-{index}.yaml",
        data,
        checkpoint={
            "every_steps": draw.choice([1, 2, 3]),
            "asynchronous": MODES[index % len(MODES)],
            "when_busy": "wait",
        },
    )
    kills = []
    for attempt in range(draw.choice(_KILLS_OF_A_RUN)):
        kill = _draw_kill(PHASES[(index + attempt) % len(PHASES)], durations, draw)
        if trainer.train(recipe, out, kill).code != 0:
            kills.append(kill)
    end = trainer.train(recipe, out)
    problems = [f"exit code {end.code}: {end.words}"] if end.code else differences(out, whole)
    found, expected = (samples_of_steps(path.with_name(f"{path.name}.samples-0")) for path in (out, whole))
    if found != expected:
        problems.append("samples")
    if len(set(expected.values())) != len(expected):
        problems.append("the undisturbed run read a sample twice")
    how = ", ".join(f"{kill.phase} {kill.occurrence} +{1000 * kill.delay:.0f} ms" for kill in kills)
    return Outcome("killed run", f"{index}: killed in {how or 'no phase (it was done before)'}", problems)


def _draw_kill(phase: str, durations: dict[str, list[float]], draw: random.Random) -> Kill:
    """A moment in one of the first calls of ``phase``, which a run that goes on has too."""
    calls = durations[phase]
    occurrence = draw.randrange(max(1, len(calls) // 2))
    return Kill(phase, occurrence, draw.uniform(0, mean(calls)))


def _durations(path: Path) -> dict[str, list[float]]:
    durations: defaultdict[str, list[float]] = defaultdict(list)
    for line in path.read_text().splitlines():
        record = json.loads(line)
        durations[record["phase"]].append(record["seconds"])
    missing: Sequence[str] = [phase for phase in PHASES if not durations[phase]]
    assert not missing, f"the undisturbed run has no {missing}"
    return durations
