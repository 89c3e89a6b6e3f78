"""``tokenformer report`` as users run it, and the report that ``tokenformer train`` leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenformer.language.prepare import prepare

RECIPE = """
model: {architecture: tokenformer, vocab_size: 384, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
  qkv_param_tokens: 8, proj_param_tokens: 8, ffn_param_tokens: 16, max_position_embeddings: 32}
data: {path: data, sequence_length: 16, batch_tokens: 64}
logging: {every_steps: 1, tensorboard: false}
stages:
- steps: 2
- {steps: 2, grow: {factor: 2}}
"""
FIGURES = ["training-loss.svg", "validation-loss-time.svg", "validation-loss.svg"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n".join(f"{i} times {i} is {i * i}" for i in range(200)))
    prepare(["text.txt"], "data")
    Path("tiny.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.usefixtures("workplace")
class TestReport:
    def test_train_leaves_a_report_and_runs_are_compared(self, run_command: Callable[..., Any]) -> None:
        trained = run_command("train", "tiny.yaml")
        assert (trained.code, trained.err) == (0, "")
        assert trained.out.splitlines()[-1] == "report: runs/tiny/report.html"
        assert sorted(file.name for file in Path("runs/tiny").glob("*.svg")) == FIGURES
        assert "<h1>Run tiny</h1>" in Path("runs/tiny/report.html").read_text()
        assert ">grown</" in Path("runs/tiny/validation-loss.svg").read_text()

        quiet = run_command("train", "tiny.yaml", "seed=1", "--out", "runs/other", "--quiet")
        assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
        assert Path("runs/other/report.html").is_file()

        done = run_command("report", "runs/tiny", "runs/other", "--out", "reports/both")
        assert (done.code, done.out, done.err) == (0, "report: reports/both/report.html\n", "")
        assert sorted(file.name for file in Path("reports/both").iterdir()) == ["report.html", *FIGURES]
        page = Path("reports/both/report.html").read_text()
        assert "<td>tiny</td>" in page
        assert "<td>other</td>" in page

        again = run_command("report", "runs/tiny", "--out", "reports/both")
        assert again.code == 2
        assert "reports/both: a directory with content is already there" in again.err
        twice = run_command("report", "runs/tiny", "runs/tiny/", "--out", "twice")
        assert twice.code == 2
        assert "runs/tiny: named twice" in twice.err

    def test_a_finished_training_does_not_fail_for_want_of_a_report(
        self, run_command: Callable[..., Any]
    ) -> None:
        assert run_command("train", "tiny.yaml").code == 0
        Path("runs/tiny/metrics.jsonl").write_text("")
        Path("runs/tiny/report.html").unlink()
        again = run_command("train", "tiny.yaml", "--resume")
        assert again.code == 0
        assert "this run is finished" in again.out
        assert "no report: runs/tiny: metrics.jsonl holds no 'loss'" in again.err
        assert not Path("runs/tiny/report.html").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["absent", "--out", "out"], "absent/metrics.jsonl: no such file; expected the metrics of a run"),
            (["data", "--out", "out"], "data/metrics.jsonl: no such file"),
            (["data"], "--out"),
            (["--out", "out"], "RUN"),
        ],
    )
    def test_wrong_input(self, run_command: Callable[..., Any], arguments: list[str], message: str) -> None:
        failed = run_command("report", *arguments)
        assert failed.code == 2
        assert message in failed.err
        assert "Traceback" not in failed.err
        assert not Path("out").exists()


COMMANDS = {
    "quickstart": "[FIELD=VALUE]...",
    "prepare": "SOURCE",
    "train": "RECIPE",
    "grow": "MODEL",
    "evaluate": "MODEL",
    "generate": "MODEL",
    "convert": "FROM",
    "inspect": "PATH",
    "report": "RUN",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_arguments_and_has_examples(run_command: Callable[..., Any], command: str) -> None:
    shown = run_command(command, "--help")
    assert shown.code == 0
    usage = next(line for line in shown.out.splitlines() if "Usage:" in line)
    assert COMMANDS[command] in usage
    shown_arguments = usage.split(command, 1)[1]
    assert shown_arguments == shown_arguments.upper()
    examples = shown.out[shown.out.index("Examples") :]
    assert f"tokenformer {command}" in examples


def test_without_a_command_there_is_help(run_command: Callable[..., Any]) -> None:
    shown = run_command()
    text = shown.out + shown.err
    assert "Usage: tokenformer" in text
    for command in COMMANDS:
        assert f" {command} " in text
