"""The report of training runs: loss against compute over runs and growth stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenformer.files import new_directory, require_free
from tokenformer.progress import short_number
from tokenformer.report.chains import read_curves
from tokenformer.report.curves import Curve
from tokenformer.report.figures import training_figure, validation_figure
from tokenformer.report.page import Section, write_page
from tokenformer.report.tables import Table

REPORT_FILE = "report.html"


def report_runs(runs: Sequence[Path | str], out: Path | str) -> Path:
    """Compare runs, or chains of them (``A+B``: B went on from A): ``report.html`` and its figures in the new ``out``.

    Raises:
        TokenFormerError: a run without metrics, or ``out`` holds something.
    """
    out = require_free(out)
    curves = read_curves(runs)
    with new_directory(out) as scratch:
        _write(scratch / REPORT_FILE, "Training runs", curves)
    return out / REPORT_FILE


def report_run(run: Path) -> Path:
    """The report of one run, ``report.html`` in its own directory; an earlier one is replaced.

    Raises:
        TokenFormerError: the run has no metrics yet.
    """
    return _write(run / REPORT_FILE, f"Run {run.resolve().name}", read_curves([run]))


def curves_table(curves: Sequence[Curve]) -> Table:
    """What each run spent, and where it ended."""
    rows = []
    for curve in curves:
        ends = [points[-1] for points in (curve.training, curve.validation) if points]
        last = max(ends, key=lambda point: point.flops)
        validation = f"{curve.validation[-1].value:.4f}" if curve.validation else "-"
        training = f"{curve.training[-1].value:.4f}" if curve.training else "-"
        spent = (short_number(last.tokens), short_number(last.flops), f"{last.seconds:.0f}")
        rows.append((curve.label, *spent, training, validation))
    columns = ("run", "tokens", "FLOPs", "seconds", "last training loss (nats/token)", "validation bits/byte")
    return Table("", columns, rows)


def _write(path: Path, title: str, curves: Sequence[Curve]) -> Path:
    figures = {"training-loss": training_figure(curves)}
    captions = {
        "training-loss": "Training loss (running mean) against total compute, all growth stages included."
    }
    if any(curve.validation for curve in curves):
        with_validation = [curve for curve in curves if curve.validation]
        figures = {
            "validation-loss": validation_figure(with_validation),
            "validation-loss-time": validation_figure(with_validation, "seconds"),
            **figures,
        }
        captions["validation-loss"] = "Validation loss against total compute, all growth stages included."
        captions["validation-loss-time"] = "The same against training time."
    sections = [
        Section("Loss against compute", figures=[(captions[name], svg) for name, svg in figures.items()]),
        Section("Runs", tables=[curves_table(curves)]),
    ]
    lead = "Compute counts forward and backward passes over all growth stages."
    return write_page(path, title, lead, sections, figures)
