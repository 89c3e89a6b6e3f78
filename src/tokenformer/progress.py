"""Progress on a terminal, with rate and time left; silence everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _RateColumn(ProgressColumn):
    """Units per second, e.g. ``12.3k tokens/s``."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{short_number(speed)} {task.fields['unit']}/s", style="cyan")


class ProgressBar:
    """One bar; ``advance`` by units done, ``note`` sets the words at its end."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress = progress
        self._task = task

    def advance(self, amount: float = 1) -> None:
        self._progress.advance(self._task, amount)  # type: ignore[arg-type]

    def expect(self, total: float | None) -> None:
        """Correct the total; None where it is not known."""
        self._progress.update(self._task, total=total)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)  # type: ignore[arg-type]


@contextmanager
def progress_bar(
    description: str, total: float | None, unit: str, *, done: float = 0
) -> Iterator[ProgressBar]:
    """A bar on standard error while the block runs; nothing is printed when that is not a terminal.

    What is printed meanwhile appears above the bar; standard output that goes elsewhere than to a terminal still does.
    """
    console = Console(stderr=True)
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    shown, apart = console.is_terminal, not sys.stdout.isatty()
    with Progress(*columns, console=console, disable=not shown, redirect_stdout=not apart) as progress:
        task = progress.add_task(description, total=total, completed=done, unit=unit, note="")  # type: ignore[arg-type]
        yield ProgressBar(progress, task)


def short_number(value: float) -> str:
    """Three significant digits with a decimal suffix: 12345 -> ``12.3k``."""
    for limit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"
