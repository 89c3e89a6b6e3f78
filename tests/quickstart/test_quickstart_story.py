"""The whole story through the command line, in a tiny setting; undisturbed, interrupted, and where it may not go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.scoring import score
from tokenformer.models.directory import load_model
from tokenformer.quickstart.plan import RUNS
from tokenformer.quickstart.results import QuickstartResults
from tokenformer.quickstart.story import TITLES
from tokenformer.report.curves import read_curve
from tokenformer.train.step import StepResult, TrainStep

RunCommand = Callable[..., Any]

_COMMAND = "from tokenformer.cli.main import main; main()"


class Story(NamedTuple):
    """A finished quickstart: its directory and what the command printed."""

    out: Path
    printed: str


@pytest.fixture(scope="module")
def story(tiny_plan: list[str], tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Once through, undisturbed."""
    out = tmp_path_factory.mktemp("quickstart") / "runs" / "tiny"
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, "quickstart", "--out", str(out), *tiny_plan],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return Story(out, done.stdout)


def read_results(out: Path) -> QuickstartResults:
    return QuickstartResults.model_validate_json((out / "results.json").read_text())


def comparable(out: Path) -> dict[str, Any]:
    """``results.json`` without what a clock measured."""
    values = json.loads((out / "results.json").read_text())
    for model in values["models"]:
        assert model.pop("seconds") >= 0
    return values


def snapshot(out: Path) -> dict[str, int]:
    """When each file of the trained models and the data was written."""
    folders = [
        "data",
        "grown-start",
        *(f"{name}/{part}" for name in RUNS for part in ("checkpoints", "model")),
    ]
    files = [file for folder in folders for file in (out / folder).rglob("*") if file.is_file()]
    assert len(files) > 40
    return {str(file): file.stat().st_mtime_ns for file in files}


def test_results_say_what_lies_on_disk(story: Story) -> None:
    results = read_results(story.out)
    assert tuple(model.name for model in results.models) == RUNS
    for model in results.models:
        trained = load_model(story.out / model.name / "model")
        assert model.parameters == trained.config.num_parameters()
        curve = read_curve(story.out / model.name)
        assert (model.flops, model.tokens) == (curve.validation[-1].flops, curve.validation[-1].tokens)
        assert model.tokens == 64 * model.steps
        assert 0 < model.bits_per_byte < 12
        assert model.bytes_scored > 0
        assert model.sample.startswith("def main(")
        assert len(model.sample) > len("def main(")
    growth = results.growth
    assert (growth.parameters_before, growth.parameters_after) == (
        results.of("small").parameters,
        results.of("grown").parameters,
    )
    assert results.of("grown").steps == 6


def test_growing_does_not_move_the_loss(story: Story) -> None:
    growth = read_results(story.out).growth
    assert growth.loss_after == pytest.approx(growth.loss_before, rel=1e-6)
    assert growth.logit_change <= 1e-6
    assert growth.parameters_after > 1.4 * growth.parameters_before


def test_every_side_has_spent_the_same_within_a_step(story: Story) -> None:
    results = read_results(story.out)
    budget = results.of("grown").flops
    assert budget > results.of("small").flops
    for name in ("large", "transformer"):
        model = results.of(name)
        assert abs(model.flops - budget) <= model.flops / model.steps


def test_scores_are_those_of_evaluate(story: Story) -> None:
    data = DataDirectory.open(story.out / "data")
    model = load_model(story.out / "transformer" / "model")
    values = score(model, data, sequence_length=16, device="cpu", max_tokens=256)
    result = read_results(story.out).of("transformer")
    assert (values.bits_per_byte, values.loss) == pytest.approx((result.bits_per_byte, result.loss), rel=1e-6)


class Headings(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tag = ""
        self.texts: dict[str, list[str]] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        self.texts.setdefault(tag, []).append("")

    def handle_data(self, data: str) -> None:
        if self.tag:
            self.texts[self.tag][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.tag = ""


def test_the_report_has_figures_tables_and_samples(story: Story) -> None:
    html = (story.out / "report.html").read_text("utf-8")
    page = Headings(html)
    assert len(page.texts["svg"]) == 3
    titles = list(TITLES.values())
    assert page.texts["h3"] == [*titles, "plan.yaml"]
    results = read_results(story.out)
    samples = [model.sample for model in results.models]
    # a parser sees newlines as HTML has them, and drops one at the start of pre
    assert [text.split() for text in page.texts["pre"][:4]] == [sample.split() for sample in samples]
    assert page.texts["pre"][4] == (story.out / "plan.yaml").read_text()
    for model in results.models:
        assert {TITLES[model.name], f"{model.parameters:,}", f"{model.bits_per_byte:.4f}"} <= set(
            page.texts["td"]
        )
    figure = (story.out / "loss-against-compute.svg").read_text()
    for title in titles:
        assert f">{title}</" in figure
    assert figure.count(">grown</") == 1


def test_what_is_printed(story: Story) -> None:
    printed = story.printed
    for name in RUNS:
        assert f"train: {TITLES[name]}" in printed
        assert f"{name}, step " in printed
    assert "stage 0" not in printed
    ranked = sorted(read_results(story.out).models[1:], key=lambda model: model.bits_per_byte)
    assert "lowest held-out bits per byte first: " in printed
    places = [printed.index(f"({model.bits_per_byte:.3f})") for model in ranked]
    assert places == sorted(places)
    assert printed.rstrip().splitlines()[-1] == f"report: {(story.out / 'report.html').resolve()}"


def test_every_run_has_its_report(story: Story) -> None:
    for name in RUNS:
        assert f"<h1>Run {name}</h1>" in (story.out / name / "report.html").read_text()


def test_done_again_it_trains_nothing(story: Story, tiny_plan: list[str], run_command: RunCommand) -> None:
    before, results = snapshot(story.out), (story.out / "results.json").read_bytes()
    (story.out / "report.html").unlink()
    again = run_command("quickstart", "--out", story.out, *tiny_plan)
    assert (again.code, again.err) == (0, "")
    assert "train: " not in again.out
    assert snapshot(story.out) == before
    assert (story.out / "results.json").read_bytes() == results
    assert (story.out / "report.html").is_file()


def test_another_plan_in_the_same_directory(
    story: Story, tiny_plan: list[str], run_command: RunCommand
) -> None:
    before = snapshot(story.out)
    refused = run_command("quickstart", "--out", story.out, *tiny_plan, "runs.small.steps=4")
    assert refused.code == 2
    assert "holds a quickstart with another plan" in refused.err
    assert snapshot(story.out) == before


def test_a_wrong_corpus_can_be_put_right(
    tmp_path: Path, tiny_plan: list[str], run_command: RunCommand
) -> None:
    out = tmp_path / "out"
    failed = run_command("quickstart", "--out", out, *tiny_plan, f"corpus=[{tmp_path / 'absent'}]")
    assert failed.code == 2
    assert "absent" in failed.err

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with mock.patch("tokenformer.quickstart.story.train", stop):
        begun = run_command("quickstart", "--out", out, *tiny_plan)
    assert begun.code == 128 + signal.SIGINT
    assert "stopped; the same command goes on from here" in begun.err
    assert (out / "data" / "dataset.json").is_file()


def stop_before(step_number: int) -> Any:
    """Send SIGINT when the given training step of the whole story begins."""
    take_step, taken = TrainStep.__call__, 0

    def step(self: TrainStep, batches: Iterator[Any], stage_step: int, *rest: int) -> StepResult:
        nonlocal taken
        taken += 1
        if taken == step_number:
            signal.raise_signal(signal.SIGINT)
        return take_step(self, batches, stage_step, *rest)

    return mock.patch.object(TrainStep, "__call__", step)


def test_interrupted_again_and_again_it_ends_the_same(
    story: Story, tiny_plan: list[str], tmp_path: Path, run_command: RunCommand
) -> None:
    out = tmp_path / "out"
    arguments = ("quickstart", "--out", out, *tiny_plan)
    with stop_before(2):  # in the middle of the small run
        first = run_command(*arguments)
    assert first.code == 128 + signal.SIGINT
    assert first.err == "stopped; the same command goes on from here\n"
    with stop_before(4):  # the last step of the small run and all of the grown one, but not its report
        second = run_command(*arguments)
    assert second.code == 128 + signal.SIGINT
    assert "out/small: goes on at step 2" in second.out
    assert (out / "small" / "report.html").is_file()
    assert not (out / "grown" / "report.html").exists()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with mock.patch("tokenformer.quickstart.story.generate", stop):  # all trained, nothing assessed
        third = run_command(*arguments)
    assert third.code == 128 + signal.SIGINT
    assert (out / "grown" / "report.html").is_file()
    assert not (out / "results.json").exists()
    assert run_command(*arguments).code == 0
    assert comparable(out) == comparable(story.out)
