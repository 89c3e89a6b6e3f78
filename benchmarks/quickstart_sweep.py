"""Choose learning rate, schedule and initialisation for every run of the quickstart, each side with the same care.

    python benchmarks/quickstart_sweep.py --out sweep --workers 12

Round 1 tries a grid with one seed. Round 2 repeats the best few settings of every side with further seeds and
ranks them by their median. Each finished run is a line in ``OUT/results.jsonl``; a run that is there is not done
again. What is compared: bits per byte on the validation split after the same total FLOPs (small and grown
together for the grown side).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tokenformer.quickstart.plan import QuickstartPlan, RunName, load_plan

Setting = dict[
    str, Any
]  # side, lr, initializer, schedule, seed; for "grown" also small_* of the run it grows from


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    plan = load_plan(arguments.override)
    prepare_data(plan, arguments.out)
    sweep = Sweep(plan, arguments.out, arguments.workers, arguments.deadline)
    sweep.run(grid(arguments.tiny))
    sweep.run(growths(sweep.results, arguments.tiny))
    for seed in arguments.seeds:
        sweep.run(again(sweep.results, seed, arguments.keep))
        sweep.run(growths_again(sweep.results, seed, arguments.keep))
    print_ranking(sweep.results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "override", nargs="*", help="fields of the quickstart's plan, e.g. runs.small.steps=100"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=4, help="runs at once")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[1, 2], help="further seeds of the best settings"
    )
    parser.add_argument("--keep", type=int, default=2, help="settings of each side that are repeated")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which no run is started")
    parser.add_argument("--tiny", action="store_true", help="two settings a side, to try the script")
    return parser.parse_args()


RATES = (0.0005, 0.001, 0.002, 0.004, 0.008)
SCHEDULES = ("cosine", "wsd", "constant")
FROM_SCRATCH = ("small", "large", "transformer")


def grid(tiny: bool) -> list[Setting]:
    """Round 1 of the sides that start from scratch: the same grid for each."""
    return [
        {"side": side, "schedule": schedule, "lr": lr, "initializer": initializer, "seed": 0}
        for lr in (RATES[2:3] if tiny else RATES)
        for schedule in (SCHEDULES[:1] if tiny else SCHEDULES)
        for initializer in ("fan_in", "published")
        for side in FROM_SCRATCH
    ]


def growths(results: list[Setting], tiny: bool) -> list[Setting]:
    """Round 1 of growing: from the best small runs of each schedule, every rate."""
    starts = []
    for schedule in SCHEDULES:
        same = [r for r in results if r["side"] == "small" and r["schedule"] == schedule and r["seed"] == 0]
        starts += sorted(same, key=lambda r: r["bits_per_byte"])[: 1 if tiny else 2]
    rates = RATES[2:3] if tiny else RATES
    return [
        grown_setting(start, lr, schedule) for start in starts for lr in rates for schedule in SCHEDULES[:2]
    ]


def grown_setting(start: Setting, lr: float, schedule: str) -> Setting:
    return {
        "side": "grown",
        "schedule": schedule,
        "lr": lr,
        "seed": start["seed"],
        **{f"small_{name}": start[name] for name in ("lr", "initializer", "schedule")},
    }


def again(results: list[Setting], seed: int, keep: int) -> list[Setting]:
    """The best settings of each from-scratch side with another seed, and the small runs that the best growths need."""
    chosen = [s for side in ("large", "transformer") for s in best(results, side, keep)]
    chosen += [
        {"side": "small", **{name: s[f"small_{name}"] for name in ("lr", "initializer", "schedule")}}
        for s in best(results, "grown", keep)
    ]
    return [{**setting, "seed": seed} for setting in chosen]


def growths_again(results: list[Setting], seed: int, keep: int) -> list[Setting]:
    return [{**setting, "seed": seed} for setting in best(results, "grown", keep)]


def best(results: list[Setting], side: str, keep: int) -> list[Setting]:
    """Settings of a side by their result with seed 0, without seed and result."""
    ranked = sorted(
        (r for r in results if r["side"] == side and r["seed"] == 0), key=lambda r: r["bits_per_byte"]
    )
    return [setting_of(result) for result in ranked[:keep]]


def setting_of(result: Setting) -> Setting:
    return {name: value for name, value in result.items() if name not in ("seed", *MEASURED)}


MEASURED = ("bits_per_byte", "parameters", "tokens", "flops", "seconds", "device")


class Sweep:
    """Runs settings in worker processes and keeps every result."""

    def __init__(self, plan: QuickstartPlan, out: Path, workers: int, deadline: float) -> None:
        self.plan, self.out, self.workers = plan, out, workers
        self.deadline = time.monotonic() + deadline
        self.file = out / "results.jsonl"
        lines = self.file.read_text("utf-8").splitlines() if self.file.exists() else []
        self.results: list[Setting] = [json.loads(line) for line in lines]

    def run(self, settings: Iterable[Setting]) -> None:
        done = {name_of(result) for result in self.results}
        missing = {name_of(setting): setting for setting in settings}
        missing = {name: setting for name, setting in missing.items() if name not in done}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, mp_context=context) as pool:
            text = self.plan.to_yaml()
            futures = [pool.submit(train_one, text, self.out, s, self.deadline) for s in missing.values()]
            for number, future in enumerate(as_completed(futures), 1):
                result = future.result()
                if result is None:
                    continue
                self.results.append(result)
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                print(f"{number}/{len(futures)} {name_of(result)} {result['bits_per_byte']:.4f}", flush=True)


def name_of(setting: Setting) -> str:
    known = {name: value for name, value in setting.items() if name not in MEASURED}
    return "-".join(f"{known[name]}" for name in sorted(known, key=lambda n: (n != "side", n)))


def prepare_data(plan: QuickstartPlan, out: Path) -> None:
    from tokenformer.language.prepare import prepare

    if not (out / "data").exists():
        prepare(plan.corpus, out / "data", validation_fraction=plan.validation_fraction)


def train_one(plan_text: str, out: Path, setting: Setting, deadline: float) -> Setting | None:
    """One run, in a worker process; None when it is too late to start."""
    if time.monotonic() > deadline:
        return None
    import torch

    from tokenformer.quickstart.plan import parse_plan
    from tokenformer.train.config import RunConfig
    from tokenformer.train.run import train
    from tokenformer.validation import validate

    torch.set_num_threads(1)
    plan = parse_plan(plan_text)
    values = run_values(plan, out, setting)
    run = out / name_of(setting)
    try:
        result = train(validate(RunConfig, values, source=name_of(setting)), run, resume=True, quiet=True)
        score, state = result.metrics["val_bits_per_byte"], result.state
    except Exception as error:  # a diverging setting is a result too: it ranks last
        print(f"{name_of(setting)}: {error}", file=sys.stderr, flush=True)
        return {**setting, "bits_per_byte": float("inf")}
    return {
        **setting,
        "bits_per_byte": score,
        "tokens": state.tokens,
        "flops": state.flops,
        "seconds": state.seconds,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def run_values(plan: QuickstartPlan, out: Path, setting: Setting) -> dict[str, Any]:
    side: RunName = setting["side"]
    if side == "grown":
        grow_start(plan, out, setting)
    values = plan.run_config(side, out).model_dump(mode="json", exclude_none=True)
    values["optimizer"]["lr"] = setting["lr"]
    values["schedule"]["name"] = setting["schedule"]
    values["seed"] = setting["seed"]
    values["data"]["seed"] = setting["seed"]
    values["evaluation"] |= {"every_steps": 100_000, "max_tokens": plan.evaluation_tokens}
    values["logging"] |= {"tensorboard": False, "every_steps": 50}
    values["checkpoint"] |= {"every_steps": 100_000}
    if side == "grown":
        values["init_from"] = str(start_of(out, setting))
    else:
        values["model"]["initializer"] = setting["initializer"]
    return values


def grow_start(plan: QuickstartPlan, out: Path, setting: Setting) -> None:
    from tokenformer.train.checkpoint.folder import list_checkpoints
    from tokenformer.train.grow import grow_directory

    small = {"side": "small", **{n: setting[f"small_{n}"] for n in ("lr", "initializer", "schedule")}}
    small["seed"] = setting["seed"]
    grow_directory(
        list_checkpoints(out / name_of(small))[-1], start_of(out, setting), plan.grow, seed=setting["seed"]
    )


def start_of(out: Path, setting: Setting) -> Path:
    return out / f"start-{name_of(setting)}"


def print_ranking(results: list[Setting]) -> None:
    """Best settings of each side: median over seeds first, then single runs."""
    for side in ("small", "grown", "large", "transformer"):
        grouped: dict[str, list[Setting]] = {}
        for result in results:
            if result["side"] == side:
                grouped.setdefault(json.dumps(setting_of(result), sort_keys=True), []).append(result)
        ranked = sorted(
            grouped.items(),
            key=lambda item: (-len(item[1]), statistics.median(r["bits_per_byte"] for r in item[1])),
        )
        print(f"\n{side}")
        for setting, runs in ranked[:8]:
            scores = sorted(r["bits_per_byte"] for r in runs)
            print(f"  {statistics.median(scores):.4f} ({', '.join(f'{s:.4f}' for s in scores)}) {setting}")


if __name__ == "__main__":
    main()
