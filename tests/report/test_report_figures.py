"""Curves from metrics as they are written, and the figures drawn from them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tokenformer.errors import TokenFormerError
from tokenformer.report.curves import Curve, Point, read_curve
from tokenformer.report.figures import COLORS, training_figure, validation_figure

SVG = "{http://www.w3.org/2000/svg}"


def line(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "stage": 0,
        "tokens": 64 * step,
        "flops": 1e6 * step,
        "seconds": 0.5 * step,
        **values,
    }


def write_run(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that grows at step 4; one loss was not finite."""
    lines = [
        line(2, loss=5.0, lr=0.1),
        line(4, loss=None, lr=0.1),
        line(4, val_loss=4.0, val_bits_per_byte=6.0),
        line(4, parameters=10, logit_change=0.0),
        line(6, loss=3.0, lr=0.1),
        line(6, val_loss=2.5, val_bits_per_byte=4.5),
    ]
    return write_run(tmp_path / "ladder", lines)


def test_a_curve_holds_what_the_metrics_say(run: Path) -> None:
    curve = read_curve(run)
    assert curve.label == "ladder"
    assert curve.training == [Point(2e6, 128, 1.0, 5.0), Point(6e6, 384, 3.0, 3.0)]
    assert curve.validation == [Point(4e6, 256, 2.0, 6.0), Point(6e6, 384, 3.0, 4.5)]
    assert curve.growths == [4e6]
    assert read_curve(run, "another").label == "another"


def test_the_current_directory_has_a_name_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert read_curve(".").label == "ladder"


def test_a_grown_curve_begins_where_the_earlier_one_ended() -> None:
    earlier = Curve("small", [Point(1, 1, 1, 5), Point(2, 2, 2, 4)], [Point(2, 2, 2, 3)], [])
    later = Curve("grown", [Point(3, 3, 3, 3)], [Point(4, 4, 4, 2)], [3.5])
    whole = later.after(earlier)
    assert whole.label == "grown"
    assert whole.training == [Point(2, 2, 2, 4), Point(3, 3, 3, 3)]
    assert whole.validation == [Point(2, 2, 2, 3), Point(4, 4, 4, 2)]
    assert whole.growths == [2, 3.5]
    unseen = later.after(earlier._replace(validation=[]))
    assert unseen.growths == [2, 3.5]
    assert unseen.validation == later.validation


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no 'loss' and no 'val_bits_per_byte' yet"),
        ([line(1, lr=0.1), line(2, loss=None)], "holds no 'loss'"),
        ([{"step": 1, "loss": 2.0}], "a line without 'flops'"),
    ],
)
def test_metrics_that_make_no_curve(tmp_path: Path, lines: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(TokenFormerError, match=message):
        read_curve(write_run(tmp_path / "run", lines))


def test_a_run_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(
        TokenFormerError, match=r"metrics\.jsonl: no such file; expected the metrics of a run"
    ):
        read_curve(tmp_path)


def make_curve(label: str, *, growths: Sequence[float] = (), scale: float = 1.0) -> Curve:
    points = [Point(scale * 1e6 * i, 64 * i, 0.5 * i, 8 / i) for i in range(1, 12)]
    return Curve(label, points, points[::3], growths)


def texts(svg: str) -> list[str]:
    """What stands in the figure, read as XML."""
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    return ["".join(element.itertext()).strip() for element in root.iter(f"{SVG}text")]


LABELS = [
    "plain",
    "_hidden",
    "cost $x_$ and $",
    "<script>alert(1)</script> & more",
    "größer -- 大",
    "two",
    "three",
    "seven",
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("draw", [validation_figure, training_figure])
def test_figures_are_well_formed_and_hold_every_label_as_it_is(draw: Any) -> None:
    curves = [make_curve(label, scale=index) for index, label in enumerate(LABELS, 1)]
    svg = draw(curves)
    shown = texts(svg)
    assert [text for text in shown if text in LABELS] == LABELS
    assert "total training compute (FLOPs)" in shown
    assert "grown" not in shown
    assert "<script" not in svg
    for color in COLORS:
        assert color.lower() in svg


def test_growths_are_marked_against_compute_alone() -> None:
    curve = make_curve("run", growths=[3e6, 7e6])
    assert texts(validation_figure([curve])).count("grown") == 2
    assert texts(training_figure([curve])).count("grown") == 2
    for axis, name in (("tokens", "training tokens"), ("seconds", "training time (s)")):
        shown = texts(validation_figure([curve], axis))  # type: ignore[arg-type]
        assert name in shown
        assert "grown" not in shown


def test_the_same_curves_give_the_same_text() -> None:
    curves = [make_curve("one", growths=[2e6]), make_curve("two", scale=50)]
    for draw in (validation_figure, training_figure):
        svg = draw(curves)
        assert draw(curves) == svg
        assert not re.search(r"20\d\d-\d\d-\d\d", svg)
        assert draw(list(reversed(curves))) != svg


def test_figures_refer_to_nothing_outside() -> None:
    svg = validation_figure([make_curve("run", growths=[2e6])])
    ids = set(re.findall(r'\bid="([^"]+)"', svg))
    references = re.findall(r'href="([^"]+)"', svg) + re.findall(r"url\(([^)]+)\)", svg)
    assert references
    assert {reference.removeprefix("#") for reference in references} <= ids


def test_a_curve_of_one_point_and_one_of_none() -> None:
    point = Point(1e6, 64, 0.5, 3.0)
    svg = training_figure([Curve("one", [point], [], []), Curve("none", [], [point], [])])
    assert {"one", "none"} <= set(texts(svg))
