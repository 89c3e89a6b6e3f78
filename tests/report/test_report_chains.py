"""Runs that go on from each other, as one curve over what all of them spent."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tokenformer.errors import TokenFormerError
from tokenformer.language.prepare import prepare
from tokenformer.report.chains import join, read_curves
from tokenformer.report.curves import Curve, Point

RECIPE = """
model: {architecture: tokenformer, vocab_size: 384, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
  qkv_param_tokens: 8, proj_param_tokens: 8, ffn_param_tokens: 16, max_position_embeddings: 32}
data: {path: data, sequence_length: 16, batch_tokens: 64}
logging: {tensorboard: false, every_steps: 5}
evaluation: {every_steps: 5, max_tokens: 64}
steps: 10
"""


def points(*flops: float) -> list[Point]:
    return [Point(at, int(at), at / 2, 9 - at) for at in flops]


def write_run(path: Path, steps: Sequence[int]) -> Path:
    path.mkdir(parents=True)
    counters = ("step", "tokens", "flops", "seconds")
    lines = [json.dumps({"stage": 0, "loss": 1.0, **dict.fromkeys(counters, step)}) for step in steps]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [1]) for name in ("a/x", "b/x", "b/y")]
    assert [curve.label for curve in read_curves(runs[1:])] == ["x", "y"]
    assert [curve.label for curve in read_curves(runs)] == [str(run) for run in runs]
    with pytest.raises(TokenFormerError, match=r"x: named twice"):
        read_curves([runs[0], tmp_path / "b" / ".." / "a" / "x"])


def test_a_name_with_a_plus_is_one_run(tmp_path: Path) -> None:
    assert read_curves([write_run(tmp_path / "a+b", [1])])[0].label == "a+b"
    with pytest.raises(TokenFormerError, match="joined by"):
        read_curves([f"{tmp_path}/a+"])


def test_counters_that_begin_anew_are_added_to_what_was_spent() -> None:
    earlier = Curve("small", points(1, 2), points(2), [])
    whole = join(earlier, Curve("large", points(1, 3), points(3), [2]), counts_anew=True, grown=True)
    assert whole.label == "large"
    assert [point.flops for point in whole.training] == [1, 2, 3, 5]
    assert whole.validation == [Point(2, 2, 1, 7), Point(5, 5, 2.5, 6)]
    assert whole.growths == [2, 4]


def test_counters_that_went_on_leave_out_what_lies_behind_the_start() -> None:
    earlier = Curve("small", points(1, 2, 3, 4), points(2, 4), [1, 3])
    whole = join(earlier, Curve("large", points(3, 5), points(5), []), counts_anew=False, grown=False)
    assert [point.flops for point in whole.training] == [1, 2, 3, 5]
    assert [point.flops for point in whole.validation] == [2, 5]
    assert whole.growths == [1]


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_what_was_grown_by_command_counts_with_its_small_stage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_command: Callable[..., Any],
    from_checkpoint: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n".join(f"{i} times {i} is {i * i}" for i in range(200)))
    prepare(["text.txt"], "data")
    Path("small.yaml").write_text(RECIPE)
    model = RECIPE[RECIPE.index("model") : RECIPE.index("data:")]
    Path("large.yaml").write_text(RECIPE.replace(model, "init_from: grown\n"))
    source = "runs/small/checkpoints/step-00000010" if from_checkpoint else "runs/small"
    for command in (
        ("train", "small.yaml", "--out", "runs/small"),
        ("grow", source, "--out", "grown", "--factor", 2),
        ("train", "large.yaml", "--out", "runs/large"),
        ("report", "runs/small+runs/large", "runs/small", "--out", "report"),
    ):
        done = run_command(*command)
        assert done.code == 0, done.err
    whole, small = read_curves(["runs/small+runs/large", "runs/small"])
    assert (whole.label, small.label) == ("small + large", "small")
    assert [point.tokens for point in whole.validation] == [320, 640, 960, 1280]
    assert whole.validation[:2] == small.validation
    assert whole.growths == [small.validation[-1].flops]
    assert "small + large" in Path("report/validation-loss.svg").read_text()
    assert "grown" in Path("report/validation-loss.svg").read_text()
