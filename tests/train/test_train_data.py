"""Runs on mixtures and packed documents, and runs whose data fail on the way."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tokenformer.errors import DataError, TokenFormerError
from tokenformer.language import data_file
from tokenformer.language.prepare import prepare
from tokenformer.models.directory import load_model
from tokenformer.report.inspect import inspect_path
from tokenformer.train.checkpoint.folder import list_checkpoints
from tokenformer.train.config import RunConfig, parse_run_config
from tokenformer.train.metrics import read_metrics
from tokenformer.train.run import train
from tokenformer.train.state import read_state

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three small data directories of documents."""
    folder = tmp_path_factory.mktemp("mixture")
    made = []
    for name, text in (
        ("web", "a page of text. "),
        ("code", "def f(x): return x\n"),
        ("math", "1 + 1 = 2; "),
    ):
        lines = [json.dumps({"text": f"{i} {text * (1 + i % 6)}"}) + "\n" for i in range(80)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        prepare([folder / f"{name}.jsonl"], folder / name, tokenizer="byte", validation_fraction=0.2)
        made.append(folder / name)
    return made


@pytest.fixture
def mixture(directories: list[Path]) -> dict[str, object]:
    """The data section of a run over all three."""
    parts = [
        {"path": str(path), "weight": weight}
        for path, weight in zip(directories, (0.5, 0.3, 0.2), strict=True)
    ]
    return {"mixture": parts, "sequence_length": 16, "batch_tokens": 64}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_model(out / "model").state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_a_mixture_is_trained_on_and_resumed_exactly(
    make_config: MakeConfig, mixture: dict[str, object], tmp_path: Path, packing: str
) -> None:
    config = make_config(f"data.packing={packing}", "steps=6", "checkpoint.every_steps=3", data=mixture)
    whole = train(config, tmp_path / "whole", quiet=True)
    metrics = read_metrics(whole.out)[-1]
    parts = [metrics[f"val_loss/{name}"] for name in ("web", "code", "math")]
    assert metrics["val_loss"] == pytest.approx(0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2])
    card = (whole.model / "README.md").read_text()
    assert "web, 0.5 of the samples" in card
    inspect_path(whole.out)

    last, former = (list_checkpoints(whole.out)[index] for index in (-1, 0))
    assert read_state(former).step == 3
    other = train(config, tmp_path / "other", quiet=True)
    for path in list_checkpoints(other.out)[1:]:
        shutil.rmtree(path)
    resumed = train(
        make_config(
            f"data.packing={packing}",
            "steps=6",
            "checkpoint.every_steps=3",
            "data.num_workers=1",
            "data.micro_batch_size=3",
            data=mixture,
        ),
        other.out,
        resume=True,
        quiet=True,
    )
    assert resumed.state.next_sample == whole.state.next_sample == 24
    assert last.name == resumed.checkpoint.name
    for name, tensor in weights(whole.out).items():  # other micro-batches round differently
        torch.testing.assert_close(weights(other.out)[name], tensor, rtol=1e-4, atol=1e-5)


def test_what_is_trained_on_may_not_change_on_the_way(
    make_config: MakeConfig, mixture: dict[str, object], directories: list[Path], tmp_path: Path
) -> None:
    train(make_config("steps=2", data=mixture), tmp_path / "run", quiet=True)
    for change, field in (
        ("data.mixture.0.weight=0.6", "data.mixture.0.weight"),
        ("data.packing=documents", "data.packing"),
    ):
        with pytest.raises(TokenFormerError, match=f"{field}: "):
            train(make_config("steps=2", change, data=mixture), tmp_path / "run", resume=True, quiet=True)


def test_a_stage_may_change_its_data(
    make_config: MakeConfig, mixture: dict[str, object], directories: list[Path]
) -> None:
    alone = {"path": str(directories[0])}
    config = make_config(stages=[{"steps": 1}, {"steps": 1, "data": alone}, {"steps": 1}], data=mixture)
    again = parse_run_config(config.to_yaml(), source="test")
    for stages in (config.resolve(), again.resolve()):
        assert [len(stage.data.components) for stage in stages] == [3, 1, 3]
        assert stages[0].data.stream == stages[2].data.stream != stages[1].data.stream


def test_exactly_one_source(make_config: MakeConfig, mixture: dict[str, object]) -> None:
    with pytest.raises(TokenFormerError, match="data: found both, expected exactly one of path, mixture"):
        make_config(data=mixture | {"path": "x"})
    with pytest.raises(TokenFormerError, match="data: found neither, expected exactly one of path, mixture"):
        make_config(data={"sequence_length": 16, "batch_tokens": 64})
    with pytest.raises(TokenFormerError, match=r"data\.mixture\.0\.weight: found 0"):
        make_config("data.mixture.0.weight=0", data=mixture)


def _fail_at(monkeypatch: pytest.MonkeyPatch, path: Path, step: int, break_it: Callable[[], None]) -> None:
    """Break the data once ``step`` steps of four windows have been read (with what is read ahead)."""
    reads, pread = 0, os.pread

    def counting(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal reads
        if os.fstat(descriptor).st_ino == path.stat().st_ino if path.exists() else False:
            reads += 1
            if reads == step * 4 + 1:
                break_it()
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counting)


@pytest.mark.parametrize("fault", ["cut off", "gone"])
def test_data_that_fail_end_the_run_after_saving_it(
    make_config: MakeConfig, data_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The run stops with file and byte, keeps what it has learned, and goes on exactly when the file is back."""
    expected = train(make_config("steps=20"), tmp_path / "expected", quiet=True)
    shard = data_directory / "train.bin"
    content = shard.read_bytes()

    def break_it() -> None:
        if fault == "gone":
            shard.unlink()
        else:
            os.truncate(shard, 0)

    monkeypatch.setattr(data_file, "LOOK_SECONDS", 0.0)
    try:
        with monkeypatch.context() as patch:
            _fail_at(patch, shard, 8, break_it)
            with pytest.raises(DataError) as caught:
                train(make_config("steps=20"), tmp_path / "run", quiet=True)
        assert "train.bin: " in str(caught.value)
        assert "while reading at byte " in str(caught.value)
        state = read_state(list_checkpoints(tmp_path / "run")[-1])
        assert f"the run is saved after step {state.step}: put the data right" in str(caught.value)
        assert state.step == 8
        with pytest.raises(TokenFormerError, match=r"train\.bin: "):
            train(make_config("steps=20"), tmp_path / "run", resume=True, quiet=True)
    finally:
        shard.write_bytes(content)
    resumed = train(make_config("steps=20"), tmp_path / "run", resume=True, quiet=True)
    assert same(weights(expected.out), weights(resumed.out))
    assert [line.get("loss") for line in read_metrics(resumed.out)] == [
        line.get("loss") for line in read_metrics(expected.out)
    ]


def test_reads_that_had_to_be_repeated_are_counted(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_file, "RETRY_SECONDS", (0.0, 0.0))
    expected = train(make_config(), tmp_path / "expected", quiet=True)
    left, pread = [5], os.pread

    def flaky(descriptor: int, length: int, offset: int) -> bytes:
        if length == 34 and offset and left[0]:  # a training window of 17 tokens, and not the header
            left[0] -= 1
            if left[0] % 2:
                raise OSError(5, "Input/output error")
        return pread(descriptor, length, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", flaky)
        result = train(make_config(), tmp_path / "run", quiet=True)
    assert next(line for line in read_metrics(result.out) if "loss" in line)["data_retries"] == 2
    assert "data_retries" not in expected.metrics
    assert same(weights(expected.out), weights(result.out))


def test_validation_that_fails_ends_the_run_after_saving_it(
    make_config: MakeConfig, data_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_file, "LOOK_SECONDS", 0.0)
    config = make_config("steps=9", "evaluation.every_steps=4")
    shard = data_directory / "validation.bin"
    content = shard.read_bytes()
    try:
        with monkeypatch.context() as patch:
            _fail_at(patch, data_directory / "train.bin", 2, shard.unlink)
            with pytest.raises(
                DataError, match=r"validation\.bin: .* the run is saved after step 4: put the data right"
            ):
                train(config, tmp_path / "run", quiet=True)
    finally:
        shard.write_bytes(content)
    assert train(config, tmp_path / "run", resume=True, quiet=True).state.step == 9


def _one_of_two_ranks(rank: int, port: int, config: str, out: Path) -> None:
    """A rank of a run; the second finds its training data unreadable after a while."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    reads, pread = 0, os.pread

    def failing(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal reads
        if length == 34 and offset:  # a training window of 17 tokens, and not the header
            reads += 1
            if rank == 1 and reads > 10:  # two windows a step
                raise PermissionError(13, "Permission denied")
        return pread(descriptor, length, offset)

    os.pread = failing
    try:
        train(parse_run_config(config, source="test"), out / "run", quiet=True)
    except TokenFormerError as error:
        (out / f"rank{rank}").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.slow
def test_one_rank_that_cannot_read_ends_all_after_saving(make_config: MakeConfig, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = make_config("steps=50", "parallel.device=cpu")
    torch.multiprocessing.spawn(_one_of_two_ranks, (port, config.to_yaml(), tmp_path), nprocs=2)
    assert (tmp_path / "rank0").read_text().startswith("ToldElsewhere: another rank cannot read its data")
    told = (tmp_path / "rank1").read_text()
    assert "train.bin: cannot be read (Permission denied), while reading at byte" in told
    assert "the run is saved after step 5" in told
    assert read_state(list_checkpoints(tmp_path / "run")[-1]).next_sample == 20
