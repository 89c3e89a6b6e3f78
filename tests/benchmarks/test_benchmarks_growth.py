"""The growth comparison in a small form: every kind of run, going on where it stopped, its table and figures."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "benchmarks" / "growth" / "plans" / "tiny.yaml"


def run_command(*arguments: object) -> str:
    """What the command prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.syspath_prepend(str(ROOT))
        main = importlib.import_module("benchmarks.growth.__main__").main
        main([str(argument) for argument in arguments])
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data directory, and the directory of a finished comparison."""
    folder = tmp_path_factory.mktemp("growth")
    sources = []
    for name, count in (("train", 400), ("validation", 60), ("test", 60)):
        source = folder / f"{name}.jsonl"
        lines = [
            json.dumps({"text": f"{name} {number}: the sum of {number} and 3 is {number + 3}.\n"})
            for number in range(count)
        ]
        source.write_text("\n".join(lines), "utf-8")
        sources.append(source)
    data, out = folder / "data", folder / "out"
    run_command("data", sources[0], "--validation", sources[1], "--test", sources[2], "--out", data)
    run_command("run", TINY, "--data", data, "--out", out)
    return data, out


def read(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "results.jsonl").read_text("utf-8").splitlines()
    return {result["id"]: result for result in map(json.loads, lines)}


def test_every_run_has_a_result_with_its_configuration(finished: tuple[Path, Path]) -> None:
    results = read(finished[1])
    assert len(results) == 15
    assert (
        results["normed#0"]["val"] != results["large#0"]["val"]
    )  # normed queries and keys, and nothing else
    for result in results.values():
        assert "error" not in result
        assert 0 < result["val"] < 12
        assert 0 < result["test"] < 12
        assert result["effective"]["steps"] > 0
        assert result["curve"][-1][0] == result["total_flops"] == pytest.approx(result["flops"], rel=0.2)
        assert {"commit", "machine", "torch", "train_seconds", "wall_seconds"} <= result.keys()


def test_budgets_count_the_smaller_stages(finished: tuple[Path, Path]) -> None:
    results = read(finished[1])
    small, copies, ladder = (results[f"{name}#0"] for name in ("small", "copies", "ladder"))
    assert small["total_flops"] < copies["curve"][0][0]
    assert copies["total_flops"] < ladder["curve"][0][0]
    assert ladder["parameters"] > copies["parameters"] > small["parameters"]


def test_exact_growth_is_exact_and_watched(finished: tuple[Path, Path]) -> None:
    results = read(finished[1])
    for name in ("grown/moments=keep#0", "grown/moments=reset#0", "values#0", "ladder#0", "wide#0"):
        assert results[name]["started"]["relative_change"] < 1e-6
    assert results["deep#0"]["started"]["relative_change"] > 1e-6  # stacking moves the function
    watched = results["grown/moments=keep#0"]
    assert watched["effective"]["evaluation"]["every_steps"] == 10
    assert watched["val"] != results["grown/moments=reset#0"]["val"]


def test_a_finished_plan_is_not_done_again_and_a_changed_run_is(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    data, out = finished
    assert "0 runs" in run_command("run", TINY, "--data", data, "--out", out, "--dry")
    changed = tmp_path / "changed.yaml"
    changed.write_text(
        TINY.read_text("utf-8").replace(
            "flops: 4.0e+8, set: {growth.deepen", "flops: 5.0e+8, set: {growth.deepen"
        ),
        "utf-8",
    )
    planned = run_command("run", changed, "--data", data, "--out", out, "--dry")
    assert planned.startswith("deep#0")
    assert "1 runs" in planned


def test_results_from_before_a_field_came_count(finished: tuple[Path, Path], tmp_path: Path) -> None:
    old = (finished[1] / "results.jsonl").read_text("utf-8").replace(', "new_tokens": "zero_keys"', "")
    assert old.count("new_tokens") == 1  # zero_values
    (tmp_path / "results.jsonl").write_text(old, "utf-8")
    assert "0 runs" in run_command("run", TINY, "--data", finished[0], "--out", tmp_path, "--dry")


def test_what_cannot_end_in_time_is_left_out(finished: tuple[Path, Path], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    text = TINY.read_text("utf-8").split("runs:")[0]
    plan.write_text(
        f"speed: 1.0e+7\n{text}runs:\n"
        "  - {name: long, model: large, flops: 4.0e+12}\n"
        "  - {name: trunk, group: parents, model: small, flops: 1.0e+8, set: {schedule.name: constant}}\n"
        "  - {name: branch, parent: trunk, flops: 4.0e+12}\n"
        "  - {name: short, model: small, flops: 1.0e+8}\n",
        "utf-8",
    )
    printed = run_command("run", plan, "--data", finished[0], "--out", tmp_path / "out", "--seconds", 60)
    # a run that others begin from alone is not worth its time without one of them
    assert printed.splitlines()[-1] == "left out (3): long#0, trunk#0, branch#0"
    assert read(tmp_path / "out").keys() == {"short#0"}


def test_table_and_figures(finished: tuple[Path, Path], tmp_path: Path) -> None:
    results = finished[1] / "results.jsonl"
    table = run_command("table", results)
    assert "grown/moments=keep" in table.split("== growth")[0]
    assert "grown/moments=keep: loss moved by 0 at once" in table.split("== growth")[1]
    drawn = run_command("figures", results, "--out", tmp_path / "figures").splitlines()
    assert [Path(path).name for path in drawn] == ["runs-flops.svg", "runs-rates.svg", "runs-ends.svg"]
    chosen = tmp_path / "chosen" / "two.svg"
    run_command("figures", results, "--runs", "grown/moments=keep", "large", "--out", chosen)
    drawn.append(str(chosen))
    text = chosen.read_text("utf-8")
    assert "grown, 0M, 3e-07 PFLOP (1)" in text
    assert "copies, " not in text
    assert all(Path(path).read_text("utf-8").rstrip().endswith("</svg>") for path in drawn)


def test_table_for_a_document_over_several_files(finished: tuple[Path, Path], tmp_path: Path) -> None:
    results = finished[1] / "results.jsonl"
    more = tmp_path / "more.jsonl"
    for_seed = {"id": "large#1", "seed": 1, "val": 1.25, "test": None}
    more.write_text(json.dumps(read(finished[1])["large#0"] | for_seed) + "\n", "utf-8")
    table = run_command("table", more, results, "--markdown", "--groups", "runs").splitlines()
    first, second = (f"{run['val']:.3f}" for run in (read(finished[1])["large#0"], for_seed))
    (line,) = (line for line in table if "`large`" in line)
    assert f"({first}, {second})" in line
    assert line.endswith("-) |")
    assert sum("**" in line for line in table) == 1
    assert any("`grown/moments=keep` (1) | 0.0e+00" in line for line in table)
    run_command("figures", more, results, "--runs", "large", "--out", tmp_path / "two.svg")
    assert "PFLOP (2)" in (tmp_path / "two.svg").read_text("utf-8")
    with pytest.raises(SystemExit):
        run_command("table", results, "--groups", "no-such")


def test_curves_of_seeds_that_were_validated_elsewhere(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        figures = importlib.import_module("benchmarks.growth.figures")
    lines = [[[1.0, 1, 4.0], [2.0, 2, 3.0], [4.0, 4, 1.0]], [[0.5, 1, 5.0], [3.0, 2, 2.5], [3.99, 3, 1.5]]]
    flops, values = figures._median_line(lines)
    assert flops == [1.0, 2.0, 4.0]
    assert values == pytest.approx([4.25, 3.25, 1.25])
    parents = [{"id": "small#0", "curve": [1], "source": source} for source in ("a", "b")]
    child = {"parent": "small", "seed": 0, "source": "b"}
    assert figures._parent(child, parents) is parents[1]


@pytest.mark.parametrize("path", sorted(TINY.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_plan_is_valid(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        plan = importlib.import_module("benchmarks.growth.plan")
    runs = plan.expand(plan.load_plan(path))
    flops = {run.id: run.flops for run in runs}
    assert all(run.flops > flops.get(run.parent_id, 0) for run in runs)


def test_a_plan_with_an_unknown_parent_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("config: {}\nmodels: {}\nruns: [{name: a, parent: b, flops: 1.0}]\n", "utf-8")
    with pytest.raises(SystemExit) as stopped:
        run_command("run", plan, "--data", tmp_path, "--out", tmp_path / "o")
    assert stopped.value.code == 2
    assert "its parent 'b#0' is not in the plan" in capsys.readouterr().err


def test_statistics_of_fresh_weights(finished: tuple[Path, Path], tmp_path: Path) -> None:
    written = tmp_path / "statistics.json"
    run_command(
        "statistics",
        TINY,
        "small",
        "transformer/lr=0.003",
        "--data",
        finished[0],
        "--steps",
        0,
        "--json",
        written,
    )
    small, transformer = json.loads(written.read_text("utf-8")).values()
    assert small["qkv keys"]["weight"] == pytest.approx(16**-0.5, rel=0.1)
    assert small["qkv"]["scores"] == pytest.approx(1, rel=0.3)  # normed inputs, keys of 1/sqrt(d)
    assert 0 < small["ffn"]["active"] < 1
    assert small["all"]["loss"] == pytest.approx(5.95, abs=0.3)  # ln 384
    assert transformer["proj"]["weight"] == pytest.approx((2 * 2 * 16) ** -0.5, rel=0.1)
    assert all(entry["gradient"] > 0 for entry in transformer.values() if "gradient" in entry)


def test_python_source_is_split_by_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(300):
        (source / f"module_{number}.py").write_text(f"value = {number}\n" * 30, "utf-8")
    (source / "again.py").write_text("value = 7\n" * 30, "utf-8")
    run_command("python", source, "--out", tmp_path / "data")
    splits = json.loads((tmp_path / "data" / "dataset.json").read_text("utf-8"))["splits"]
    counts = {name: split["documents"] for name, split in splits.items()}
    assert sum(counts.values()) == 300  # a text that stands there twice counts once
    assert counts["train"] > 250
    assert min(counts["validation"], counts["test"]) >= 1
