"""``python -m drills``: do the drills, print a table, and exit with 1 if one failed."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from drills.damage import damaged_checkpoints, full_disk, lost_data
from drills.kills import killed_runs
from drills.outcome import Outcome
from drills.processes import Trainer
from drills.ranks import hung_rank, lost_ranks, other_numbers, sick_rank

DRILLS = ("kills", "damage", "data", "disk", "lost", "numbers", "hung", "sick")


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(prog="python -m drills", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="runs that are killed (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments (default: 0)")
    parser.add_argument(
        "--only", nargs="+", choices=DRILLS, default=DRILLS, help="these drills (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes there too")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs in this new directory")
    options = parser.parse_args()
    trainer = Trainer()
    drills: dict[str, Callable[[Path], list[Outcome]]] = {
        "kills": lambda folder: killed_runs(folder, trainer, options.runs, options.seed),
        "damage": lambda folder: damaged_checkpoints(folder, trainer),
        "data": lambda folder: lost_data(folder, trainer),
        "disk": lambda folder: full_disk(folder, trainer),
        "lost": lambda folder: lost_ranks(folder, max(1, options.runs // 5), options.seed),
        "numbers": lambda folder: other_numbers(folder, trainer),
        "hung": lambda folder: hung_rank(folder, trainer),
        "sick": lambda folder: sick_rank(folder, trainer, options.seed),
    }
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        for name in options.only:
            start = time.perf_counter()
            for outcome in drills[name](folder / name):
                outcomes.append(outcome)
                _print(outcome)
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(_report(outcomes, options.seed), indent=2) + "\n")
    failed = sum(outcome.word == "FAILED" for outcome in outcomes)
    print(f"{len(outcomes)} drills, {failed} failed, {sum(o.word == 'skipped' for o in outcomes)} skipped")
    return 1 if failed else 0


def _print(outcome: Outcome) -> None:
    reason = outcome.skipped or "; ".join(outcome.problems)
    print(f"{outcome.word:8} {outcome.drill:20} {outcome.what}{': ' if reason else ''}{reason}", flush=True)


def _report(outcomes: list[Outcome], seed: int) -> dict[str, object]:
    machine = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}
    return {"seed": seed, **machine, "outcomes": [o._asdict() | {"word": o.word} for o in outcomes]}


if __name__ == "__main__":
    sys.exit(main())
