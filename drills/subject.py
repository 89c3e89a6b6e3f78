"""The run that the drills are done to: a ladder of three stages that takes seconds, and how two of its ends compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tokenformer.language.prepare import prepare
from tokenformer.train.checkpoint.contents import read_checkpoint
from tokenformer.train.checkpoint.folder import list_checkpoints
from tokenformer.train.metrics import read_metrics

MODEL = {
    "architecture": "tokenformer",
    "vocab_size": 384,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "qkv_param_tokens": 8,
    "proj_param_tokens": 8,
    "ffn_param_tokens": 16,
    "max_position_embeddings": 32,
}
"""So small that a step takes milliseconds."""

STEPS = (6, 5, 5)
MODES = (False, "thread", "process")
"""How checkpoints are written (``checkpoint.asynchronous``)."""
_TIMES = {"seconds", "tokens_per_second", "tokens_per_second_per_device", "seconds_left"}


def write_data(folder: Path, lines: int = 800) -> Path:
    """A data directory of byte tokens; of as many lines it has more windows than the run reads, so that none comes
    twice."""
    text = "\n".join(f"{i} squared is {i * i}, and {i} plus {i} is {i + i}." for i in range(lines))
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text(text)
    prepare([folder / "text.txt"], folder / "data", tokenizer="byte")
    return folder / "data"


def write_recipe(path: Path, data: Path, **changes: Any) -> Path:
    """The recipe of the run; ``changes`` replace top-level sections."""
    values: dict[str, Any] = {
        "model": MODEL,
        "data": {"path": str(data), "sequence_length": 32, "batch_tokens": 256},
        "optimizer": {"lr": 1e-2},
        "evaluation": {"every_steps": 4, "max_tokens": 512},
        "logging": {"every_steps": 3, "tensorboard": False},
        "checkpoint": {"every_steps": 2},
        "precision": {"deterministic": True},
        "parallel": {"device": "cpu", "num_threads": 1},
        "stages": [
            {"name": "small", "steps": STEPS[0]},
            {"name": "larger", "steps": STEPS[1], "grow": {"factor": 2}},
            {"name": "largest", "steps": STEPS[2], "grow": {"qkv": 24, "ffn": 40}},
        ],
    }
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path


def differences(run: Path, whole: Path) -> list[str]:
    """In what the end of ``run`` differs from that of ``whole``, which was never disturbed: not one bit may."""
    found = []
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        if (run / "model" / name).read_bytes() != (whole / "model" / name).read_bytes():
            found.append(f"model/{name}")
    one, other = (read_checkpoint(list_checkpoints(path)[-1]) for path in (run, whole))
    if one.state.model_dump(exclude={"seconds"}) != other.state.model_dump(exclude={"seconds"}):
        found.append("counters")
    tensors, expected = one.contents().tensors, other.contents().tensors
    if tensors.keys() != expected.keys() or any(
        tensors[name].numpy().tobytes() != expected[name].numpy().tobytes() for name in expected
    ):
        found.append("checkpoint tensors")
    if _metrics(run) != _metrics(whole):
        found.append("metrics")
    remains = [path.name for place in (run, run / "checkpoints") for path in place.glob(".*")]
    return found + [f"left behind: {name}" for name in remains]


def _metrics(run: Path) -> list[dict[str, Any]]:
    """Every line, without what a clock measured."""
    return [{k: v for k, v in line.items() if k not in _TIMES} for line in read_metrics(run)]


def samples_of_steps(log: Path) -> dict[tuple[str, int], str]:
    """Which samples each step was finally trained on: a hash of its windows, by stage and step. A step that was
    trained again after a kill counts as it was trained last."""
    last: dict[tuple[str, int], str] = {}
    for line in log.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # the last line of a killed process may be cut off
            record = json.loads(line)
            last[record["stage"], record["stage_step"]] = record["samples"]
    return dict(sorted(last.items()))
