"""Reports: the page as a browser would read it, and the report of real and hand-written runs."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tokenformer.errors import TokenFormerError
from tokenformer.report.curves import Curve, Point
from tokenformer.report.page import Section, render_page, write_page
from tokenformer.report.runs import curves_table, report_run, report_runs
from tokenformer.report.tables import Table

VOID = {"meta", "br", "hr", "img", "link", "input"}
FETCHING = {"src", "srcset", "action", "data", "poster", "background"}
HOSTILE = "<script>alert('&')</script>"


class Page(HTMLParser):
    """Checks that every element is closed where it should be, and collects tags, texts and what would be fetched."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        for name, value in attrs:
            inside = (value or "").startswith("#")
            if name in FETCHING or (name in ("href", "xlink:href") and not inside):
                self.fetched.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def cells(self, tag: str = "td") -> list[str]:
        return [text for parent, text in self.texts if parent == tag]


def write_run(path: Path, losses: list[float | None], *, validation: bool = True) -> Path:
    path.mkdir(parents=True)
    lines = []
    for step, loss in enumerate(losses, 1):
        counters = {"step": step, "stage": 0, "tokens": 64 * step, "flops": 1e6 * step, "seconds": 2.0 * step}
        lines.append({**counters, "loss": loss})
        if validation:
            lines.append({**counters, "val_bits_per_byte": step + 0.5})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_everything_but_the_figures_is_escaped() -> None:
    figure = "<svg xmlns='http://www.w3.org/2000/svg'><text>x</text></svg>"
    sections = [
        Section(
            f"title {HOSTILE}",
            paragraphs=[f"paragraph {HOSTILE}"],
            figures=[(f"caption {HOSTILE}", figure)],
            tables=[
                Table(f"table {HOSTILE}", ("name", f"column {HOSTILE}"), [(HOSTILE, "1,234"), ("b", "-0.5")])
            ],
            samples=[(f"sample {HOSTILE}", f"  {HOSTILE}\n</pre>")],
        )
    ]
    page = Page(render_page(f"page {HOSTILE}", f"lead {HOSTILE}", sections))
    assert "script" not in page.tags
    assert page.tags.count("svg") == 1
    for parent, text in {
        "title": f"page {HOSTILE}",
        "h1": f"page {HOSTILE}",
        "p": f"lead {HOSTILE}",
        "h2": f"title {HOSTILE}",
        "figcaption": f"caption {HOSTILE}",
        "caption": f"table {HOSTILE}",
        "th": f"column {HOSTILE}",
        "td": HOSTILE,
        "h3": f"sample {HOSTILE}",
        "pre": f"{HOSTILE}\n</pre>",
    }.items():
        assert (parent, text) in page.texts
    assert page.fetched == []


def test_a_page_and_its_figures_are_files(tmp_path: Path) -> None:
    figure = '<svg xmlns="http://www.w3.org/2000/svg"><text>größer</text></svg>'
    path = write_page(tmp_path / "report.html", "Title", "Lead", [Section("One")], {"figure": figure})
    assert Page(path.read_text("utf-8")).cells("h1") == ["Title"]
    assert ElementTree.parse(tmp_path / "figure.svg").getroot()[0].text == "größer"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["figure.svg", "report.html"]


def test_runs_side_by_side(tmp_path: Path) -> None:
    first = write_run(tmp_path / f"a{HOSTILE.replace('/', '')}", [5.0, None, 4.0])
    second = write_run(tmp_path / "b", [6.0, 5.5])
    report = report_runs([first, second], tmp_path / "out" / "both")
    assert report == tmp_path / "out" / "both" / "report.html"
    page = Page(report.read_text("utf-8"))
    assert page.tags.count("svg") == 3
    assert "script" not in page.tags
    assert page.fetched == []
    assert len(page.ids) == len(set(page.ids)) > 0
    columns = len(page.cells("th"))
    rows = [page.cells()[start : start + columns] for start in (0, columns)]
    assert rows == [
        [first.name, "192", "3M", "6", "4.0000", "3.5000"],
        ["b", "128", "2M", "4", "5.5000", "2.5000"],
    ]
    figures = ["training-loss.svg", "validation-loss-time.svg", "validation-loss.svg"]
    assert sorted(entry.name for entry in report.parent.iterdir()) == ["report.html", *figures]
    for name in figures:
        shown = [element.text for element in ElementTree.parse(report.parent / name).iter() if element.text]
        assert first.name in shown
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["both"]


def test_without_validation_there_is_the_training_figure_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [5.0, 4.0], validation=False)
    report = report_runs([run], tmp_path / "out")
    assert sorted(entry.name for entry in report.parent.iterdir()) == ["report.html", "training-loss.svg"]


def test_only_runs_with_validation_are_in_its_figures(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "with", [5.0]), write_run(tmp_path / "without", [5.0], validation=False)]
    report = report_runs(runs, tmp_path / "out")
    texts = {
        name: (report.parent / f"{name}.svg").read_text() for name in ("validation-loss", "training-loss")
    }
    assert [">without</" in text for text in texts.values()] == [False, True]


def test_an_output_that_holds_something_stays_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [5.0])
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(TokenFormerError, match=r"out: a directory with content is already there"):
        report_runs([run], out)
    assert [entry.name for entry in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("broken", ["absent", "empty", "damaged"])
def test_nothing_is_written_when_a_run_has_no_metrics(tmp_path: Path, broken: str) -> None:
    good, bad = write_run(tmp_path / "good", [5.0]), tmp_path / "bad"
    if broken != "absent":
        write_run(bad, [])
    if broken == "damaged":
        (bad / "metrics.jsonl").write_text('{"step": 1, \n')
    with pytest.raises(TokenFormerError, match=r"bad/metrics\.jsonl|bad: metrics\.jsonl"):
        report_runs([good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_while_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenformer.report import runs

    def fail(*arguments: object) -> Path:
        (arguments[0]).with_name("half.svg").write_text("<svg")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_page", fail)
    with pytest.raises(TokenFormerError, match=r"out: could not be written \(No space left on device\)"):
        report_runs([write_run(tmp_path / "run", [5.0])], tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_the_report_of_a_run_is_replaced(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [5.0])
    assert report_run(run) == run / "report.html"
    before = (run / "report.html").read_text()
    report_run(run)
    assert (run / "report.html").read_text() == before
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(
        metrics + metrics.replace("5.0", "2.25").replace('"step": 1', '"step": 2')
    )
    report_run(run)
    after = (run / "report.html").read_text()
    assert "2.2500" in after
    assert "2.2500" not in before
    assert not list(run.glob(".*"))


def test_the_table_says_where_each_run_ended() -> None:
    points = [Point(1e6, 10, 1.0, 3.0), Point(2.5e9, 2000, 2.0, 2.0)]
    curves = [Curve("a", points, [], []), Curve("b", [], points[:1], []), Curve("c", points, points[:1], [])]
    table = curves_table(curves)
    assert table.rows == [
        ("a", "2k", "2.5G", "2", "2.0000", "-"),
        ("b", "10", "1M", "1", "-", "3.0000"),
        ("c", "2k", "2.5G", "2", "2.0000", "3.0000"),
    ]
