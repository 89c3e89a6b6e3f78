"""Figures as SVG text, drawn with matplotlib away from any screen. The same curves give the same text."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from tokenformer.report.curves import Curve, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Axis = Literal["flops", "tokens", "seconds"]
# Okabe and Ito: told apart with any colour vision
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LABELS = {
    "flops": "total training compute (FLOPs)",
    "tokens": "training tokens",
    "seconds": "training time (s)",
}
_LOG_RANGE = 30  # an axis that spans more than this is logarithmic
# the first share of a curve, where the loss falls from chance level, does not set the scale
_SHOWN_FROM = 0.03
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def validation_figure(curves: Sequence[Curve], axis: Axis = "flops") -> str:
    """Validation bits per byte against what was spent; growth steps are marked. Returns SVG text."""
    return _draw(
        curves,
        axis,
        lambda curve: curve.validation,
        "validation loss (bits per byte)",
        marker="o",
    )


def training_figure(curves: Sequence[Curve], axis: Axis = "flops") -> str:
    """Training loss against what was spent, a running mean over the raw values. Returns SVG text."""
    return _draw(
        curves,
        axis,
        lambda curve: _smooth(curve.training),
        "training loss (nats per token)",
        marker="",
    )


def _draw(
    curves: Sequence[Curve],
    axis: Axis,
    points_of: Callable[[Curve], Sequence[Point]],
    ylabel: str,
    *,
    marker: str,
) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    # text stays text: searchable, in any script, and small; ids are the same every time, and others in other figures
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{ylabel} {axis}"}):
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        axes = figure.add_subplot()
        lines = []
        for index, curve in enumerate(curves):
            color = COLORS[index % len(COLORS)]
            points = points_of(curve)
            spent = [getattr(point, axis) for point in points]
            values = [point.value for point in points]
            lines += axes.plot(spent, values, color=color, marker=marker, markersize=3.5, linewidth=1.8)
            if axis == "flops":
                _mark_growths(axes, curve.growths, color)
        _scale(axes, [points_of(curve) for curve in curves], axis)
        axes.set_xlabel(_LABELS[axis])
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        _add_legend(axes, lines, [curve.label for curve in curves])
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Glyph .* missing"
            )  # to measure with; who shows the text has it
            FigureCanvasSVG(figure).print_svg(buffer, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    return re.sub(
        r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :]
    )  # names of groups, the same in every figure


def _mark_growths(axes: Axes, growths: Sequence[float], color: str) -> None:
    for at in growths:
        axes.axvline(at, color=color, linestyle=":", linewidth=1, alpha=0.8)
        axes.annotate(
            "grown",
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -12),
            textcoords="offset points",
            color=color,
            fontsize=8,
        )


def _add_legend(axes: Axes, lines: Sequence[Line2D], labels: Sequence[str]) -> None:
    """The labels as they are: names of directories are no mathematics (``$``), nor hidden (a leading ``_``)."""
    legend = axes.legend(lines, [str(index) for index in range(len(lines))], frameon=False)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def _scale(axes: Axes, series: Sequence[Sequence[Point]], axis: Axis) -> None:
    spent = [getattr(point, axis) for points in series for point in points if getattr(point, axis) > 0]
    if not spent:
        return
    if max(spent) > _LOG_RANGE * min(spent):
        axes.set_xscale("log")
    settled = [
        point.value
        for points in series
        for point in points
        if getattr(point, axis) >= _SHOWN_FROM * max(spent)
    ]
    if settled and max(settled) > min(settled):
        margin = 0.06 * (max(settled) - min(settled))
        axes.set_ylim(min(settled) - margin, max(settled) + margin)


def _smooth(points: Sequence[Point], share: float = 0.05) -> list[Point]:
    """Exponential running mean over about ``share`` of the points, corrected for its start."""
    keep = 1 - 1 / max(1.0, share * len(points))
    mean, weight, smoothed = 0.0, 0.0, []
    for point in points:
        mean, weight = keep * mean + (1 - keep) * point.value, keep * weight + (1 - keep)
        smoothed.append(point._replace(value=mean / weight))
    return smoothed
