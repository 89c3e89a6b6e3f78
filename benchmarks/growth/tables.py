"""Tables of results: medians over seeds, as text or for a document."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.growth.execute import Result

from tokenformer.errors import TokenFormerError


def read_all(paths: Iterable[Path]) -> list[Result]:
    """Results of several files, each with its file (``source``); of one id in one file the last line counts."""
    found: dict[tuple[str, str], Result] = {}
    for path in paths:
        for line in path.read_text("utf-8").splitlines():
            result = json.loads(line)
            found[str(path), result["id"]] = result | {"source": str(path)}
    return list(found.values())


def by_name(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results that differ in the seed alone."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result["name"], []).append(result)
    return grouped


def by_group(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of each group, in the order in which they are found."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result["group"], []).append(result)
    return grouped


def choose_groups(results: Sequence[Result], groups: Sequence[str]) -> list[Result]:
    """Results of these groups alone, in this order; of all where none is named.

    Raises:
        TokenFormerError: a group without a result.
    """
    found = by_group(results)
    if missing := [group for group in groups if group not in found]:
        raise TokenFormerError(f"--groups: found {', '.join(missing)}, expected some of {', '.join(found)}")
    return [result for group in groups or found for result in found[group]]


def median(results: Sequence[Result], field: str = "val") -> float:
    """Median over seeds; infinite where one diverged."""
    return statistics.median(float("inf") if r.get(field) is None else r[field] for r in results)


def ranking(results: Sequence[Result]) -> list[str]:
    """One line for each kind of run, the best of each group first, by validation."""
    lines = []
    for group, found in by_group(results).items():
        lines += [f"== {group}"]
        for name, runs in _best_first(found):
            values = " ".join("-" if r.get("val") is None else f"{r['val']:.4f}" for r in runs)
            spent = f"{runs[0].get('total_flops', 0) / 1e15:.3g} PFLOP"
            size = f"{runs[0]['parameters'] / 1e6:.3g}M"
            lines.append(
                f"  val {median(runs):.4f} test {median(runs, 'test'):.4f} {size} {spent} {name} [{values}]"
            )
    return lines


def document_ranking(results: Sequence[Result]) -> list[str]:
    """:func:`ranking` as one Markdown table: medians, and every seed in parentheses where there are several; the best
    of each group is bold."""
    lines = [
        "| run | | parameters | PFLOP | validation | test |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for found in by_group(results).values():
        for place, (name, runs) in enumerate(_best_first(found)):
            runs = sorted(runs, key=lambda run: run["seed"])
            scores = [_score(runs, "val", bold=place == 0), _score(runs, "test")]
            size = f"{runs[0]['parameters'] / 1e6:.3g}M"
            cells = [runs[0]["side"], f"`{name}`", size, f"{runs[0]['flops'] / 1e15:.3g}", *scores]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def rise_after_growth(result: Result, steps: int = 200) -> float | None:
    """The highest of the fixed validations in the first steps after growth, over the level before it; None where the
    run was not watched."""
    started = result.get("started")
    if not started or not result["watch"] or not result.get("curve"):
        return None
    first = int(result["curve"][-1][1]) - int(result["effective"]["steps"])  # steps before the growth
    seen = [value for _, step, value in result["curve"] if step <= first + steps]
    return max([started["level_after"], *seen]) / started["level_before"]


def growth_lines(results: Iterable[Result]) -> list[str]:
    """One line for each kind of watched growth: how far the loss moved at once, and in the first 200 steps."""
    lines = []
    for name, runs in _watched(results).items():
        moved = max(run["started"]["relative_change"] for run in runs)
        highest = max(rise_after_growth(run) or 0.0 for run in runs)
        lines.append(
            f"  {name}: loss moved by {moved:.2g} at once; highest in 200 steps {highest:.4f} of the level before"
        )
    return ["== growth", *lines] if lines else []


def document_growth(results: Iterable[Result]) -> list[str]:
    """:func:`growth_lines` as a Markdown table, the worst over seeds."""
    lines = [
        "| growth | | loss moved by, relative | largest change of a logit, of their spread "
        "| highest in 200 steps, of the level before |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, runs in _watched(results).items():
        started = runs[0]["started"]
        sizes = f"{started['parameters_before'] / 1e6:.2g}M to {runs[0]['parameters'] / 1e6:.2g}M"
        moved, change = (max(r["started"][key] for r in runs) for key in ("relative_change", "logit_change"))
        highest = max(rise_after_growth(run) or 0.0 for run in runs)
        at = f"{sizes} at {started['flops'] / 1e15:.2g} PFLOP"
        lines.append(f"| {at} | `{name}` ({len(runs)}) | {moved:.1e} | {change:.1e} | {highest:.4f} |")
    return lines if len(lines) > 2 else []


def _watched(results: Iterable[Result]) -> dict[str, list[Result]]:
    return by_name(result for result in results if rise_after_growth(result) is not None)


def _best_first(results: Iterable[Result]) -> list[tuple[str, list[Result]]]:
    return sorted(by_name(results).items(), key=lambda item: median(item[1]))


def _score(runs: Sequence[Result], field: str, *, bold: bool = False) -> str:
    values = ["-" if run.get(field) is None else f"{run[field]:.3f}" for run in runs]
    if len(values) == 1:
        return f"**{values[0]}**" if bold else values[0]
    middle = "-" if median(runs, field) == float("inf") else f"{median(runs, field):.3f}"
    return f"{f'**{middle}**' if bold else middle} ({', '.join(values)})"
