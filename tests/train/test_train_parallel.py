"""Training does not depend on the ranks it is spread over: losses, norms, growth, evaluation, checkpoints, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from train_on_ranks import bad_sample, nan_in_steps

from tokenformer.models.directory import load_model
from tokenformer.ops.pattention import NORM_ACTIVATIONS
from tokenformer.train.checkpoint.contents import read_checkpoint
from tokenformer.train.checkpoint.folder import list_checkpoints
from tokenformer.train.config import RunConfig
from tokenformer.train.metrics import read_metrics
from tokenformer.train.run import train
from tokenformer.train.state import read_state

SCRIPT = Path(__file__).with_name("train_on_ranks.py")
Torchrun = Callable[..., Any]
MakeConfig = Callable[..., RunConfig]
NAN_STEPS = [2, 5]
BAD_SAMPLE = 30  # in step 8, since a step takes 4


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
    """Of a loss, gradient norm or validation loss, relative; counters and learning rates must be the same, and so must
    be what is not finite."""
    largest = 0.0
    for found, expected in zip(read_metrics(run), read_metrics(reference), strict=True):
        same = {"step", "stage", "tokens", "flops", "lr", "parameters", "skipped_steps"} & expected.keys()
        assert {name: found[name] for name in same} == {name: expected[name] for name in same}
        measured = {"loss", "grad_norm", "val_loss", "val_bits_per_byte"} & expected.keys()
        assert all((found[name] is None) == (expected[name] is None) for name in measured)
        for name in measured:
            if (value := expected[name]) is not None:
                largest = max(largest, abs(found[name] - value) / max(abs(value), 1e-12))
    return largest


@pytest.fixture(scope="module")
def configs(ladder: RunConfig, make_config: MakeConfig) -> dict[str, RunConfig]:
    """What :func:`on_two_ranks` trains: a ladder whose steps do not divide evenly; short runs for what goes wrong."""
    values = layout(ladder)
    values["data"] |= {"batch_tokens": 112, "micro_batch_size": 2}  # 7 sequences: shares of 3 and 4
    values["logging"]["every_steps"] = 1
    short = ("logging.every_steps=1", "optimizer.lr=6e-4", "steps=9")
    spike = "stability.spike={window: 4, sigma: 4, min_rise: 0.5}"
    return {
        "ladder": RunConfig.model_validate(values),
        "short": make_config(*short, "stability.max_nonfinite_steps=3"),
        "spike": make_config(*short, spike, "checkpoint.every_steps=4"),
    }


class TwoRanks(NamedTuple):
    """``outcomes`` of the jobs on both ranks, in order; the runs are in ``folder``."""

    outcomes: list[list[Any]]
    folder: Path


@pytest.fixture(scope="module")
def on_two_ranks(
    configs: dict[str, RunConfig], torchrun: Torchrun, tmp_path_factory: pytest.TempPathFactory
) -> TwoRanks:
    """All trainings of two ranks that the tests below look at, in one launch."""
    ladder, short, spike = configs["ladder"], configs["short"], configs["spike"]
    replicated, zero_2 = {"replicate": 2, "shard": 1}, {"reshard_after_forward": False}
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("sharded", {"config": layout(ladder, shard=2)}),
        ("stopped", {"config": layout(ladder, replicate=2), "stop_after": 3}),
        ("stopped", {"config": layout(ladder, tensor=2), "in_parts": True}),
        ("refused", {"config": layout(ladder, tensor=2, replicate=2)}),
        ("nan sharded", {"config": layout(short, shard=2, **zero_2), "nan_steps": NAN_STEPS}),
        ("nan replicated", {"config": layout(short, **replicated), "nan_steps": NAN_STEPS}),
        ("nan split", {"config": layout(short, tensor=2), "nan_steps": NAN_STEPS}),
        ("hopeless", {"config": layout(short, shard=2), "nan_steps": [2, 3, 4, 5]}),
        ("rolled back", {"config": layout(spike, shard=2), "bad_sample": BAD_SAMPLE}),
        ("stopped before growth", {"config": layout(ladder, shard=2), "stop_after": 4}),
        ("stopped before growth", {"config": layout(ladder, tensor=2)}),
    ]
    folder = tmp_path_factory.mktemp("ranks")
    outcomes = run_jobs(torchrun, 2, folder, [{"out": str(folder / name), **job} for name, job in jobs])
    return TwoRanks(outcomes, folder)


def test_two_ranks_train_as_one(
    configs: dict[str, RunConfig], on_two_ranks: TwoRanks, tmp_path: Path
) -> None:
    outcomes, folder = on_two_ranks
    reference = train(configs["ladder"], tmp_path / "one", quiet=True)
    for name in ("sharded", "stopped", "stopped before growth"):
        assert largest_difference(folder / name, reference.out) < 1e-5, name
        found, expected = load_model(folder / name / "model"), load_model(reference.model)
        # where a gradient is nearly zero, Adam makes steps of the learning rate (1e-2) of mere rounding
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-3)
    assert outcomes[0] == [[], []]
    assert [kind for kind, _ in outcomes[1]] == ["RunInterrupted"] * 2  # one rank was told, both stopped
    assert "after step 3" in outcomes[1][0][1]
    assert outcomes[2] == [[], []]  # resumed on another layout
    assert "after step 4" in outcomes[9][0][1]
    assert outcomes[10] == [[], []]
    assert {kind for kind, _ in outcomes[3]} == {"TokenFormerError", "ToldElsewhere"}
    message = "parallel: replicate 2 x tensor 2 does not divide 2 processes"
    assert [words for _, words in outcomes[3]] == [message] * 2
    assert not (folder / "refused").exists()


def test_loss_that_is_no_number_on_one_rank(
    configs: dict[str, RunConfig], on_two_ranks: TwoRanks, tmp_path: Path
) -> None:
    """The update is left out on both, moments too, as by one process; too many in a row end both, with advice."""
    outcomes, folder = on_two_ranks
    with nan_in_steps(NAN_STEPS):
        alone = train(configs["short"], tmp_path / "one", quiet=True)
    expected = read_checkpoint(alone.checkpoint)
    for name in ("nan sharded", "nan replicated", "nan split"):
        assert largest_difference(folder / name, alone.out) < 1e-5, name
        found = read_checkpoint(list_checkpoints(folder / name)[-1])
        assert found.state.skipped_steps == 2
        assert {float(entry["step"]) for entry in found.moments.values()} == {7.0}  # of 9 updates
        torch.testing.assert_close(
            found.model.state_dict(), expected.model.state_dict(), rtol=1e-3, atol=1e-4
        )
    assert outcomes[4:7] == [[[], []]] * 3
    assert {kind for kind, _ in outcomes[7]} == {"TokenFormerError", "ToldElsewhere"}
    for _, words in outcomes[7]:
        assert "step 5: loss or gradient was not finite for 3 steps in a row" in words
        assert "lower optimizer.lr" in words


def test_spike_sends_all_ranks_back(
    configs: dict[str, RunConfig], on_two_ranks: TwoRanks, tmp_path: Path
) -> None:
    outcomes, folder = on_two_ranks
    with bad_sample(configs["spike"], BAD_SAMPLE):
        alone = train(configs["spike"], tmp_path / "one", quiet=True)
    assert outcomes[8] == [[], []]
    found, expected = read_state(list_checkpoints(folder / "rolled back")[-1]), alone.state
    (one,), (other,) = found.rollbacks, expected.rollbacks
    assert (one.step, one.from_step, one.from_sample, one.to_sample) == (8, 4, 16, 32)
    assert one.model_dump(exclude={"loss", "limit"}) == other.model_dump(exclude={"loss", "limit"})
    assert (found.step, found.tokens, found.next_sample) == (9, 9 * 64, 9 * 4 + 16)
    assert (expected.step, expected.tokens, expected.next_sample) == (9, 9 * 64, 9 * 4 + 16)
    assert largest_difference(folder / "rolled back", alone.out) < 1e-5


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
