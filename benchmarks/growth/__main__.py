"""The command line; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import benchmarks.growth

from tokenformer.errors import TokenFormerError


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    try:
        arguments.command(arguments)
    except TokenFormerError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description=benchmarks.growth.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    data = commands.add_parser("data", help="documents to a data directory with three splits")
    data.add_argument("sources", nargs="+", type=Path)
    data.add_argument("--out", type=Path, required=True)
    data.add_argument("--validation", type=Path, nargs="*", default=[])
    data.add_argument("--test", type=Path, nargs="*", default=[])
    data.add_argument("--tokenizer", default="byte")
    data.set_defaults(command=prepare_data)
    python = commands.add_parser(
        "python", help="the Python source files under a directory to a data directory"
    )
    python.add_argument("source", type=Path)
    python.add_argument("--out", type=Path, required=True)
    python.add_argument("--megabytes", type=float, default=100)
    python.add_argument("--tokenizer", default="byte")
    python.set_defaults(command=prepare_python_data)
    run = commands.add_parser("run", help="do the runs of a plan that have no result yet")
    run.add_argument("plan", type=Path)
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--workers", type=int, default=1, help="runs at once on each GPU")
    run.add_argument("--seconds", type=float, default=1e9, help="start nothing that would take longer")
    run.add_argument(
        "--gpus", nargs="*", default=[], help="several GPUs: 0 1, or 0@200 for one that is free only then"
    )
    run.add_argument("--dry", action="store_true", help="only say what would be done, and what it costs")
    run.set_defaults(command=run_plan)
    table = commands.add_parser("table", help="medians over seeds")
    table.add_argument("results", type=Path, nargs="+")
    table.add_argument("--groups", nargs="+", default=[], help="these alone, in this order")
    table.add_argument("--markdown", action="store_true", help="for a document, every seed in parentheses")
    table.set_defaults(command=print_table)
    statistics = commands.add_parser("statistics", help="sizes of activations, weights and gradients by role")
    statistics.add_argument("plan", type=Path)
    statistics.add_argument("names", nargs="+", help="runs of the plan")
    statistics.add_argument("--data", type=Path, required=True)
    statistics.add_argument("--steps", type=int, nargs="+", default=[0, 100])
    statistics.add_argument("--json", type=Path)
    statistics.set_defaults(command=print_statistics)
    figures = commands.add_parser("figures", help="draw loss against FLOPs, and the sweeps")
    figures.add_argument("results", type=Path, nargs="+")
    figures.add_argument("--out", type=Path, required=True)
    figures.add_argument(
        "--runs",
        nargs="+",
        default=[],
        help="names of runs of any groups: one figure of these, FILE.svg at --out",
    )
    figures.set_defaults(command=draw_figures)
    return parser.parse_args(argv)


def prepare_data(arguments: argparse.Namespace) -> None:
    from tokenformer.language.prepare import prepare

    prepare(
        arguments.sources,
        arguments.out,
        tokenizer=arguments.tokenizer,
        validation=arguments.validation,
        test=arguments.test,
    )


def prepare_python_data(arguments: argparse.Namespace) -> None:
    from benchmarks.growth.python_source import prepare_python

    prepare_python(arguments.source, arguments.out, arguments.megabytes, arguments.tokenizer)


def run_plan(arguments: argparse.Namespace) -> None:
    from benchmarks.growth.execute import Place, find_commit
    from benchmarks.growth.plan import load_plan
    from benchmarks.growth.pool import Lane, Pool

    place = Place(arguments.data, arguments.out, find_commit())
    lanes = []
    for gpu in arguments.gpus:
        name, _, begins = gpu.partition("@")
        lanes.append(Lane(name, float(begins or 0)))
    pool = Pool(
        load_plan(arguments.plan), place, workers=arguments.workers, seconds=arguments.seconds, lanes=lanes
    )
    if arguments.dry:
        missing = pool.missing()
        for run in missing:
            print(f"{run.id}: {run.flops / 1e15:.3g} PFLOP")
        print(f"{len(missing)} runs, {sum(pool._new_flops(run) for run in missing) / 1e15:.3g} PFLOP")
        return
    left_out = pool.run()
    if left_out:
        print(f"left out ({len(left_out)}): {', '.join(run.id for run in left_out)}")


def print_table(arguments: argparse.Namespace) -> None:
    from benchmarks.growth.tables import (
        choose_groups,
        document_growth,
        document_ranking,
        growth_lines,
        ranking,
        read_all,
    )

    results = choose_groups(read_all(arguments.results), arguments.groups)
    if arguments.markdown:
        print("\n".join([*document_ranking(results), "", *document_growth(results)]).rstrip())
    else:
        print("\n".join([*ranking(results), *growth_lines(results)]))


def print_statistics(arguments: argparse.Namespace) -> None:
    from benchmarks.growth.execute import Place, find_commit
    from benchmarks.growth.plan import expand, load_plan
    from benchmarks.growth.statistics import describe, measure_run

    plan = load_plan(arguments.plan)
    runs = {run.name: run for run in reversed(expand(plan))}
    with tempfile.TemporaryDirectory() as folder:
        place = Place(arguments.data, Path(folder), find_commit())
        found = [
            (f"{name}, {steps} steps", measure_run(runs[name], plan, place, steps))
            for name in arguments.names
            for steps in arguments.steps
        ]
    print("\n".join(describe(found)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(dict(found), indent=1), "utf-8")


def draw_figures(arguments: argparse.Namespace) -> None:
    from benchmarks.growth.figures import draw_all, draw_chosen
    from benchmarks.growth.tables import read_all

    if arguments.runs:
        print(draw_chosen(read_all(arguments.results), arguments.runs, arguments.out))
        return
    for path in draw_all(read_all(arguments.results), arguments.out):
        print(path)


if __name__ == "__main__":
    main()
