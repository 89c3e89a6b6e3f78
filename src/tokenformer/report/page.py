"""A report: one HTML file that needs nothing beside it, and its figures as SVG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from tokenformer.files import write_text
from tokenformer.report.tables import Table


class Section(NamedTuple):
    """A heading, plain paragraphs, then figures (caption, SVG text), tables, and samples (title, text)."""

    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[tuple[str, str]] = ()


def render_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """HTML text; everything but the SVG figures is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("tokenformer.report").joinpath("page.html").read_text("utf-8"))
    return template.render(title=title, lead=lead, sections=sections, is_number=_is_number)


def write_page(
    path: Path, title: str, lead: str, sections: Sequence[Section], figures: Mapping[str, str]
) -> Path:
    """Write the page to ``path`` and each of ``figures`` (name -> SVG text) as ``<name>.svg`` beside it."""
    for name, svg in figures.items():
        write_text(path.parent / f"{name}.svg", '<?xml version="1.0" encoding="utf-8"?>\n' + svg)
    write_text(path, render_page(title, lead, sections))
    return path


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or (cell[:1] in "-+" and cell[1:2].isdigit())
