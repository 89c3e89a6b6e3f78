"""Tables for the terminal: with lines there, plain columns when piped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

_PIPED_WIDTH = 200


class Table(NamedTuple):
    """A titled table of strings; a column after the first one is set right where it holds numbers alone."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables to standard output, one after another."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPED_WIDTH)
    for index, table in enumerate(tables):
        if index:
            console.print()
        console.print(table.title, style="bold", markup=False)
        console.print(_to_rich(table, plain=not console.is_terminal))


def _to_rich(table: Table, *, plain: bool) -> RichTable:
    rich = RichTable(box=None if plain else box.ROUNDED, pad_edge=not plain)
    for index, column in enumerate(table.columns):
        numbers = index > 0 and all(_is_number(row[index]) for row in table.rows)
        rich.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in table.rows:
        rich.add_row(*map(Text, row))  # Text: names and samples hold no markup
    return rich


def _is_number(cell: str) -> bool:
    return not cell or cell.lstrip("-")[:1].isdigit()


def count(value: int) -> str:
    """``1234567`` -> ``1,234,567``."""
    return f"{value:,}"


def byte_size(value: int) -> str:
    """Bytes with a binary unit: ``1536`` -> ``1.5 KiB``."""
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
