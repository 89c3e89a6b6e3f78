"""Checkpoints written by several ranks together, and read by another number of them in other layouts."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tokenformer.errors import TokenFormerError
from tokenformer.growth.spec import GrowthSpec
from tokenformer.models.base import LanguageModel
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.train.checkpoint.contents import (
    TrainingCheckpoint,
    load_model_into,
    load_moments,
    read_checkpoint,
)
from tokenformer.train.checkpoint.folder import checkpoint_path, list_checkpoints
from tokenformer.train.checkpoint.manifest import require_whole
from tokenformer.train.checkpoint.ranks import Ranks, all_ranks, greatest_of_all_ranks
from tokenformer.train.checkpoint.writer import CheckpointWriter, Mode
from tokenformer.train.grow import grow_directory
from tokenformer.train.optimizer import Moments
from tokenformer.train.sections import CheckpointConfig
from tokenformer.train.state import TrainingState

RANKS = 2
POLICY = CheckpointConfig(keep_last=9)
CONFIG = TokenFormerConfig(
    vocab_size=384,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    qkv_param_tokens=7,  # no multiple of the ranks: their shares differ
    proj_param_tokens=8,
    ffn_param_tokens=16,
    max_position_embeddings=32,
)


def updated_model(wrap: Callable[[LanguageModel], object]) -> tuple[LanguageModel, Moments]:
    """A model after one AdamW step on gradients of ones, and its moments; ``wrap`` lays it out first."""
    model = build_model(CONFIG, seed=3)
    wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = {name: dict(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    return model, moments


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.full_tensor() if isinstance(found, DTensor) else found, expected)


def save(writer: CheckpointWriter, model: LanguageModel, moments: Moments, step: int, rank: int) -> None:
    rng = {"cpu": torch.full((8,), rank, dtype=torch.uint8)}
    checkpoint = TrainingCheckpoint(model, moments, TrainingState(step=step), rng=rng)
    writer.write(checkpoint, POLICY, card="A card." if step == 1 else None)


def save_and_finish(
    writer: CheckpointWriter, model: LanguageModel, moments: Moments, step: int, rank: int
) -> None:
    save(writer, model, moments, step, rank)
    writer.finish()


def work(rank: int, folder: str) -> None:
    """What each rank does; an assertion that fails here fails the test."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    whole, whole_moments = updated_model(lambda model: None)
    sharded, moments = updated_model(lambda model: fully_shard(model, mesh=mesh))
    assert isinstance(sharded.embedding.weight, DTensor)
    run = Path(folder) / "run"
    modes: list[Mode] = ["thread", "at once", "process"]
    for step, mode in enumerate(modes, 1):
        writer = CheckpointWriter(run, mode=mode, ranks=all_ranks())
        save(writer, sharded, moments, step, rank)
        with torch.no_grad():  # what the background writes is the state of its step
            kept = [parameter.to_local().clone() for parameter in sharded.parameters()]
            for parameter in sharded.parameters():
                parameter.to_local().zero_()
        writer.finish()
        writer.close()
        with torch.no_grad():
            for parameter, values in zip(sharded.parameters(), kept, strict=True):
                parameter.to_local().copy_(values)
    read_in_other_layouts(checkpoint_path(run, 1), whole, whole_moments, mesh)
    failure_of_one_is_known_to_all(run, sharded, moments, rank)
    stop_is_agreed_on(rank)
    dist.destroy_process_group()


def read_in_other_layouts(
    path: Path, whole: LanguageModel, whole_moments: Moments, mesh: dist.DeviceMesh
) -> None:
    def shard_by_columns(model: LanguageModel) -> None:
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                layout = [Shard(1)] if parameter.ndim == 2 else [Replicate()]
                new = torch.nn.Parameter(distribute_tensor(torch.zeros_like(parameter), mesh, layout))
                if isinstance(module, torch.nn.ParameterList):
                    module[int(name)] = new
                else:
                    setattr(module, name, new)

    for lay_out in (shard_by_columns, lambda model: fully_shard(model, mesh=mesh), lambda model: None):
        model = build_model(CONFIG, seed=4)
        lay_out(model)
        load_model_into(path, model)
        expected = whole.state_dict()
        assert all(same(tensor, expected[name]) for name, tensor in model.state_dict().items())
        found = load_moments(path, model)
        assert found.keys() == whole_moments.keys()
        for name, entry in found.items():
            assert all(same(entry[key], whole_moments[name][key]) for key in whole_moments[name]), name


def failure_of_one_is_known_to_all(run: Path, model: LanguageModel, moments: Moments, rank: int) -> None:
    full = OSError(28, "No space left on device")
    for background in (False, True):
        writer = CheckpointWriter(run, mode="thread" if background else "at once", ranks=all_ranks())
        refuse = mock.patch("torch.distributed.checkpoint.filesystem._write_item", side_effect=full)
        with refuse if rank == 1 else nullcontext(), pytest.raises(TokenFormerError) as caught:
            save_and_finish(writer, model, moments, 4, rank)
        assert "No space left on device" in str(caught.value)
        assert "step-00000003 is whole" in str(caught.value)
        dist.barrier()
        assert [path.name for path in (run / "checkpoints").iterdir() if "4" in path.name] == []


def stop_is_agreed_on(rank: int) -> None:
    greatest = greatest_of_all_ranks()
    assert greatest is not None
    assert greatest(15 * rank) == 15
    with pytest.raises(TokenFormerError, match="taken"):
        Ranks(dist.new_group()).first(refuse_on_the_first)


def refuse_on_the_first() -> None:
    raise TokenFormerError("taken")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    return folder / "run"


def test_one_process_reads_what_two_wrote(written: Path) -> None:
    whole, moments = updated_model(lambda model: None)
    for path in list_checkpoints(written):
        require_whole(path)
        assert {file.name[:3] for file in (path / "tensors").glob("*.distcp")} == {"__0", "__1"}
        found = read_checkpoint(path)
        assert found.model.config == CONFIG
        assert all(torch.equal(t, whole.state_dict()[name]) for name, t in found.model.state_dict().items())
        assert found.moments.keys() == moments.keys()
        for name, entry in found.moments.items():
            assert all(torch.equal(entry[key], moments[name][key]) for key in entry), name
        assert found.rng["cpu"].tolist() == [0] * 8
    assert "A card." in (written / "model" / "README.md").read_text()


def test_growth_from_a_sharded_checkpoint(written: Path, tmp_path: Path) -> None:
    source = list_checkpoints(written)[0]
    report = grow_directory(source, tmp_path / "grown", GrowthSpec(factor=2))
    assert not report.broke_exactness
    before, after = read_checkpoint(source), read_checkpoint(tmp_path / "grown")
    fresh = {name for name, _ in after.model.named_parameters()} - after.moments.keys()
    assert fresh
    assert all(name.endswith(".1") for name in fresh)
    for name, entry in before.moments.items():
        assert all(torch.equal(entry[key], after.moments[name][key]) for key in entry), name
