"""Training does not depend on the ranks it is spread over: losses, norms, growth, evaluation, checkpoints, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tokenformer.models.directory import load_model
from tokenformer.ops.pattention import NORM_ACTIVATIONS
from tokenformer.train.config import RunConfig
from tokenformer.train.metrics import read_metrics
from tokenformer.train.run import train

SCRIPT = Path(__file__).with_name("train_on_ranks.py")
Torchrun = Callable[..., Any]
MakeConfig = Callable[..., RunConfig]


def layout(config: RunConfig, **parallel: Any) -> dict[str, Any]:
    """``config`` as written, on a mesh."""
    values: dict[str, Any] = yaml.safe_load(config.to_yaml())
    values["parallel"] = {"device": "cpu", **parallel}
    return values


def run_jobs(torchrun: Torchrun, processes: int, folder: Path, jobs: list[dict[str, Any]]) -> list[list[Any]]:
    """The outcomes of the jobs, each on every rank."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    finished = torchrun(processes, SCRIPT, folder / "jobs.json", timeout=1200)
    assert finished.code == 0, finished.err
    outcomes = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    return [list(outcome) for outcome in zip(*outcomes, strict=True)]


def largest_difference(run: Path, reference: Path) -> float:
    """Of a loss, gradient norm or validation loss, relative; counters and learning rates must be the same."""
    largest = 0.0
    for found, expected in zip(read_metrics(run), read_metrics(reference), strict=True):
        same = {"step", "stage", "tokens", "flops", "lr", "parameters"} & expected.keys()
        assert {name: found[name] for name in same} == {name: expected[name] for name in same}
        measured = {"loss", "grad_norm", "val_loss", "val_bits_per_byte"} & expected.keys()
        for name in measured:
            largest = max(largest, abs(found[name] - expected[name]) / max(abs(expected[name]), 1e-12))
    return largest


def test_two_ranks_train_as_one(
    ladder: RunConfig, make_config: MakeConfig, torchrun: Torchrun, tmp_path: Path
) -> None:
    values = layout(ladder)
    values["data"] |= {"batch_tokens": 112, "micro_batch_size": 2}  # 7 sequences: shares of 3 and 4
    values["logging"]["every_steps"] = 1
    config = RunConfig.model_validate(values)
    reference = train(config, tmp_path / "one", quiet=True)
    stopped = str(tmp_path / "stopped")
    jobs: list[dict[str, Any]] = [
        {"out": str(tmp_path / "sharded"), "config": layout(config, shard=2)},
        {"out": stopped, "config": layout(config, replicate=2), "stop_after": 3},
        {"out": stopped, "config": layout(config, tensor=2)},
        {"out": str(tmp_path / "refused"), "config": layout(config, tensor=2, replicate=2)},
    ]
    outcomes = run_jobs(torchrun, 2, tmp_path / "jobs", jobs)

    for name in ("sharded", "stopped"):
        assert largest_difference(tmp_path / name, reference.out) < 1e-5, name
        found, expected = load_model(tmp_path / name / "model"), load_model(reference.model)
        # where a gradient is nearly zero, Adam makes steps of the learning rate (1e-2) of mere rounding
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-3)
    assert outcomes[0] == [[], []]
    assert [kind for kind, _ in outcomes[1]] == ["RunInterrupted"] * 2  # one rank was told, both stopped
    assert "after step 3" in outcomes[1][0][1]
    assert outcomes[2] == [[], []]  # resumed on another layout
    assert {kind for kind, _ in outcomes[3]} == {"TokenFormerError", "ToldElsewhere"}
    message = "parallel: replicate 2 x tensor 2 does not divide the 2 processes that were launched"
    assert [words for _, words in outcomes[3]] == [message] * 2
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_one_message_for_all_ranks(make_config: MakeConfig, torchrun: Torchrun, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(layout(make_config("model.ffn_param_tokens=15"), tensor=2)))
    finished = torchrun(2, "-m", "tokenformer", "train", recipe, "--out", tmp_path / "run")
    assert finished.code != 0
    assert finished.err.count("error: ") == 1
    assert "parallel.tensor: 2 ranks do not divide model.param_token_groups.ffn.0 15 evenly" in finished.err
    assert finished.err.count("exitcode  : 2") >= 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "meshes"),
    [
        (2, [(2, 1, 1), (1, 2, 1), (1, 1, 2)]),
        (4, [(4, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)]),
    ],
)
def test_thirty_steps_on_every_layout(
    processes: int,
    meshes: list[tuple[int, int, int]],
    make_config: MakeConfig,
    torchrun: Torchrun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The largest relative difference of a loss, gradient norm or validation loss is below 1e-5."""
    shared = (
        "optimizer.lr=6e-4",
        "data.batch_tokens=112",
        "data.micro_batch_size=2",
        "logging.every_steps=1",
    )
    groups = (
        "model.qkv_param_tokens=12",
        "model.param_token_groups={qkv: [8, 4], proj: [8], ffn: [8, 4, 4]}",
    )
    configs = {
        kind: make_config(*shared, *groups, f"model.norm_activation={kind}", "steps=30")
        for kind in NORM_ACTIVATIONS
    }
    transformer = {
        "architecture": "transformer",
        "vocab_size": 384,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    }
    configs["transformer"] = make_config(*shared, "steps=30", model=transformer)
    grown = [{"steps": 15}, {"steps": 15, "grow": {"factor": 2}}]
    configs["grown"] = make_config(*shared, stages=grown)
    jobs = [
        {
            "out": str(tmp_path / f"{name} {mesh}"),
            "config": layout(config, **dict(zip(("replicate", "shard", "tensor"), mesh, strict=True))),
        }
        for name, config in configs.items()
        for mesh in meshes
    ]
    run_jobs(torchrun, processes, tmp_path / "jobs", jobs)
    differences = {}
    for name, config in configs.items():
        train(config, tmp_path / name, quiet=True)
        for mesh in meshes:
            differences[f"{name} {mesh}"] = largest_difference(tmp_path / f"{name} {mesh}", tmp_path / name)
    with capsys.disabled():
        print(json.dumps(differences, indent=1))
    assert max(differences.values()) < 1e-5, differences
