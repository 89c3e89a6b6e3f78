"""Which rank a process is, as torchrun and SLURM say."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tokenformer.errors import TokenFormerError
from tokenformer.parallel.launch import Launch, find_launch, first_host

LAUNCH = Path(__file__).parents[2] / "launch"
SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[007,009-010]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_alone() -> None:
    assert find_launch({}) == Launch(0, 1, 0, launcher="none")


def test_torchrun_goes_before_slurm() -> None:
    assert find_launch(SLURM | TORCHRUN) == Launch(5, 8, 1, "10.0.0.1", 29500, "torchrun")


def test_srun() -> None:
    launch = find_launch(SLURM)
    assert launch == Launch(11, 16, 3, "gpu007", 20000 + 1234567 % 20000, "slurm")
    moved = find_launch(SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (moved.address, moved.port) == ("head", 1234)


def test_a_batch_script_is_one_process() -> None:
    assert find_launch({"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}).world_size == 1


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("node[003-005,9],other", "node003"),
        ("rack2-gpu[12,14]", "rack2-gpu12"),
        ("n[1-2]-ib,m", "n1-ib"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCHRUN | {"RANK": "first"}, "RANK: found 'first' in the environment, expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK: missing"),
        (SLURM | {"SLURM_STEP_NODELIST": "[1-2]"}, r"SLURM_STEP_NODELIST: found '\[1-2\]'"),
    ],
)
def test_broken_environment(environment: dict[str, str], message: str) -> None:
    with pytest.raises(TokenFormerError, match=message):
        find_launch(environment)


def fake(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run_script(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    return subprocess.run(
        [bash, str(LAUNCH / script), "recipe.yaml", "data.path=a b", "--out", "run"],
        env={"PATH": f"{folder}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_torchrun_script(tmp_path: Path) -> None:
    fake(tmp_path, "torchrun", 'for word; do echo "$word"; done')
    fake(tmp_path, "nvidia-smi", "echo one; echo two")
    words = run_script("torchrun.sh", tmp_path).stdout.splitlines()
    assert words[:5] == ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    train = ["-m", "tokenformer", "train", "recipe.yaml", "data.path=a b", "--out", "run", "--resume"]
    assert words[5:] == train
    several = run_script("torchrun.sh", tmp_path, NNODES="2", RDZV_ENDPOINT="host:1", NPROC="4").stdout
    assert several.splitlines()[:2] == ["--nnodes", "2"]
    assert "host:1" in several
    assert run_script("torchrun.sh", tmp_path, NNODES="2").returncode != 0


@pytest.mark.parametrize(("status", "requeued"), [(138, True), (0, False), (2, False)])
def test_slurm_script_requeues_at_the_time_limit(tmp_path: Path, status: int, requeued: bool) -> None:
    fake(tmp_path, "srun", f'echo "$@" > {tmp_path}/srun.txt; exit {status}')
    fake(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/scontrol.txt')
    assert run_script("slurm.sbatch", tmp_path, SLURM_JOB_ID="77").returncode == status
    assert (
        "tokenformer train recipe.yaml data.path=a b --out run --resume"
        in (tmp_path / "srun.txt").read_text()
    )
    assert (tmp_path / "scontrol.txt").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"
