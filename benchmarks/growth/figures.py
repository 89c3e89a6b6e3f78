"""Figures of results: loss against total FLOPs, where runs end, the sweeps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.growth.execute import Result
from benchmarks.growth.tables import by_group, by_name, median

from tokenformer.errors import TokenFormerError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_SETTLED = 0.1  # the first share of a curve does not set the scale
_NEAR = 0.02  # budgets that are met to whole steps
_SHOWN = 1.15  # ends that are worse than the best by more lie outside the figure


def draw_chosen(results: Sequence[Result], names: Sequence[str], path: Path) -> Path:
    """One figure of loss against total FLOPs over runs of several groups, labelled by side, size and budget.

    Raises:
        TokenFormerError: a name that no result with a curve has.
    """
    chosen = by_name(result for result in results if result.get("curve"))
    if missing := [name for name in names if name not in chosen]:
        raise TokenFormerError(f"--runs: no result named {', '.join(missing)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = [run for name in names for run in chosen[name]]
    return _figure(path, lambda axes: draw_curves(axes, runs, results, labels=_sizes_and_budgets(runs)))


def _sizes_and_budgets(results: Sequence[Result]) -> dict[str, str]:
    return {
        run["name"]: f"{run['side']}, {run['parameters'] / 1e6:.0f}M, {run['flops'] / 1e15:.3g} PFLOP"
        for run in results
    }


def draw_all(results: Sequence[Result], out: Path) -> list[Path]:
    """For each group its curves of loss against total FLOPs, its ends, and its sweep where a rate was varied."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for group, found in by_group(results).items():
        chosen = [result for result in found if result.get("val") is not None]
        curves = [result for result in chosen if result.get("curve")]
        if curves:
            written.append(
                _figure(out / f"{group}-flops.svg", lambda axes, r=curves: draw_curves(axes, r, results))
            )
        if len({_rate(result) for result in chosen}) > 2:
            written.append(_figure(out / f"{group}-rates.svg", lambda axes, r=chosen: draw_rates(axes, r)))
        if len(by_name(chosen)) > 2:
            written.append(_figure(out / f"{group}-ends.svg", lambda axes, r=chosen: draw_ends(axes, r)))
    return written


def draw_curves(
    axes: Axes,
    results: Sequence[Result],
    everything: Sequence[Result],
    labels: Mapping[str, str] | None = None,
) -> None:
    """Validation against total FLOPs, the median over seeds of each kind of run; a grown run's line begins with its
    parent's. ``labels``: by name, in place of sides."""
    named = by_name(results)
    if labels is None:
        sides = {name: runs[0]["side"] for name, runs in named.items()}
        labels = sides if len(set(sides.values())) == len(sides) else {name: name for name in sides}
    for index, (name, runs) in enumerate(named.items()):
        lines = [whole_curve(run, everything) for run in runs]
        flops, values = _median_line(lines)
        color = COLORS[index % len(COLORS)]
        axes.plot(flops, values, color=color, label=f"{labels[name]} ({len(runs)})", linewidth=1.6)
        for run in runs[:1]:
            for at in growth_points(run, everything):
                axes.axvline(at, color=color, linestyle=":", linewidth=0.8)
    _set_scale(axes, [whole_curve(run, everything) for run in results])
    axes.set_xscale("log")
    axes.set_xlabel("total training compute (FLOPs, smaller stages included)")
    axes.set_ylabel("validation (bits per byte)")
    axes.legend(frameon=False, fontsize=7)


def draw_rates(axes: Axes, results: Sequence[Result]) -> None:
    """Bits per byte at the end of runs against their learning rate, a line for each kind that differs in that alone."""
    kinds: dict[str, dict[float, list[float]]] = {}
    for result in results:
        if result.get("val") is not None:
            kind = _without_rate(result["name"])
            kinds.setdefault(kind, {}).setdefault(_rate(result), []).append(result["val"])
    for index, (kind, points) in enumerate(kinds.items()):
        rates = sorted(points)
        if len(rates) < 2:
            continue
        values = [statistics.median(points[rate]) for rate in rates]
        color = COLORS[index % len(COLORS)]
        axes.plot(rates, values, marker="o", markersize=3.5, color=color, label=kind, linewidth=1.4)
    axes.set_xscale("log")
    best = min(value for points in kinds.values() for values in points.values() for value in values)
    axes.set_ylim(top=min(axes.get_ylim()[1], _SHOWN * best))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation at the end (bits per byte)")
    axes.legend(frameon=False, fontsize=7)


def draw_ends(axes: Axes, results: Sequence[Result]) -> None:
    """Where each kind of run ended, a point for each seed, the best at the top."""
    named = sorted(by_name(results).items(), key=lambda item: median(item[1]), reverse=True)
    for height, (_, runs) in enumerate(named):
        values = [run["val"] for run in runs if run.get("val") is not None]
        axes.plot(values, [height] * len(values), "o", markersize=4, color=COLORS[0], alpha=0.7)
    axes.set_yticks(range(len(named)), [name for name, _ in named], fontsize=7)
    best = min(run["val"] for run in results if run.get("val") is not None)
    axes.set_xlim(right=min(axes.get_xlim()[1], _SHOWN * best))
    axes.set_xlabel("validation at the end (bits per byte)")


def whole_curve(result: Result, everything: Sequence[Result]) -> list[list[float]]:
    """[FLOPs, step, bits per byte] from the first ancestor on."""
    parent = _parent(result, everything)
    before = [] if parent is None else whole_curve(parent, everything)
    return [*before, *result["curve"]]


def growth_points(result: Result, everything: Sequence[Result]) -> list[float]:
    """Total FLOPs at which the model was made larger; a run that only goes on with its parent's model marks nothing."""
    parent = _parent(result, everything)
    if parent is None:
        return []
    grown = [parent["total_flops"]] if parent["parameters"] != result["parameters"] else []
    return [*growth_points(parent, everything), *grown]


def _median_line(lines: Sequence[Sequence[Sequence[float]]]) -> tuple[list[float], list[float]]:
    """FLOPs of the first line where all lines are, and the median there: between its validations a line is straight."""
    import numpy as np

    begin, end = max(line[0][0] for line in lines), min(line[-1][0] for line in lines)
    flops = [point[0] for point in lines[0] if begin * (1 - _NEAR) <= point[0] <= end * (1 + _NEAR)]
    at = [np.interp(flops, [point[0] for point in line], [point[2] for point in line]) for line in lines]
    return flops, np.median(at, axis=0).tolist()


def _parent(result: Result, everything: Sequence[Result]) -> Result | None:
    """From the same file, if it is there."""
    if result.get("parent") is None:
        return None
    wanted = f"{result['parent']}#{result['seed']}"
    found = [other for other in everything if other["id"] == wanted and other.get("curve")]
    return min(found, key=lambda other: other.get("source") != result.get("source"), default=None)


def _rate(result: Result) -> float:
    return float(result["config"].get("optimizer", {}).get("lr", 0.0))


def _without_rate(name: str) -> str:
    head, _, varied = name.partition("/")
    rest = ",".join(part for part in varied.split(",") if not part.startswith("lr="))
    return f"{head}/{rest}" if rest else head


def _set_scale(axes: Axes, lines: Sequence[Sequence[Sequence[float]]]) -> None:
    end = max(point[0] for line in lines for point in line)
    settled = [point[2] for line in lines for point in line if point[0] >= _SETTLED * end]
    if settled and max(settled) > min(settled):
        margin = 0.05 * (max(settled) - min(settled))
        axes.set_ylim(min(settled) - margin, max(settled) + margin)


def _figure(path: Path, draw: Any) -> Path:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        FigureCanvasSVG(figure).print_svg(str(path), metadata={"Date": None})
    return path
