"""Checkpoints: complete or not there, and clear words for everything that can be wrong with one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tokenformer.errors import TokenFormerError
from tokenformer.growth.grow import grow_model
from tokenformer.growth.spec import GrowthSpec
from tokenformer.models.paths import resolve_model_directory
from tokenformer.report.inspect import inspect_path
from tokenformer.train.checkpoint.contents import (
    CheckpointContents,
    read_checkpoint,
    write_checkpoint,
    write_contents,
)
from tokenformer.train.checkpoint.folder import (
    find_newest_whole,
    list_checkpoints,
    prune_checkpoints,
    remove_remains,
)
from tokenformer.train.checkpoint.manifest import DamagedCheckpointError, require_whole
from tokenformer.train.config import RunConfig
from tokenformer.train.grow import grow_directory
from tokenformer.train.run import train

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def checkpoint(make_config: MakeConfig, tmp_path: Path) -> Path:
    return train(make_config("steps=2"), tmp_path / "run", quiet=True).checkpoint


def test_written_checkpoint_reads_back(checkpoint: Path, tmp_path: Path) -> None:
    one = read_checkpoint(checkpoint)
    write_checkpoint(tmp_path / "copy", one)
    two = read_checkpoint(tmp_path / "copy")
    assert two.state == one.state
    assert two.run_config == one.run_config
    assert two.tokenizer is not None
    assert one.tokenizer is not None
    assert two.tokenizer.sha256 == one.tokenizer.sha256
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(two.model.state_dict()[name], tensor), name
    assert one.moments.keys() == dict(one.model.named_parameters()).keys()
    for name, entry in one.moments.items():
        assert all(torch.equal(entry[key], two.moments[name][key]) for key in entry), name
    assert torch.equal(one.rng["cpu"], two.rng["cpu"])


def test_grown_checkpoint_is_one_that_training_goes_on_with(
    checkpoint: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    small = read_checkpoint(checkpoint)
    grown = grow_model(small.model, GrowthSpec(factor=2), step=small.state.step)
    larger = replace(small, model=grown.model, moments=grown.moments(small.moments))
    write_checkpoint(tmp_path / "grown", larger)
    config = make_config("steps=1", model=None, init_from=str(tmp_path / "grown"))
    result = train(config, tmp_path / "next", quiet=True)
    moments = read_checkpoint(result.checkpoint).moments
    assert moments["blocks.0.ffn.key_tokens.0"]["step"] == 3
    assert moments["blocks.0.ffn.key_tokens.1"]["step"] == 1
    assert (result.state.step, result.state.next_sample) == (3, 12)


def test_nothing_is_overwritten(checkpoint: Path) -> None:
    with pytest.raises(TokenFormerError, match="already there"):
        write_checkpoint(checkpoint, read_checkpoint(checkpoint))


@pytest.mark.parametrize("name", ["tensors/__0_0.distcp", "tensors/.metadata", "config.json", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
def test_damaged_files_are_named(checkpoint: Path, name: str, damage: str) -> None:
    file = checkpoint / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\x00garbage" * 40)
    with pytest.raises(TokenFormerError) as caught:
        read_checkpoint(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert "()" not in str(caught.value)  # a cause without words is named by its type


def test_a_checkpoint_is_no_model_directory(checkpoint: Path) -> None:
    with pytest.raises(TokenFormerError, match="a training checkpoint; expected a model directory"):
        resolve_model_directory(checkpoint)


def test_weights_of_another_size_are_refused(checkpoint: Path, reseal: Callable[[Path], None]) -> None:
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 384', '"vocab_size": 512'))
    reseal(checkpoint)
    with pytest.raises(TokenFormerError, match=r"embedding.weight: found \(384, 16\), expected \(512, 16\)"):
        read_checkpoint(checkpoint)


def test_only_the_last_ones_are_kept(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config("checkpoint={every_steps: 1, keep_last: 3}"), tmp_path / "run", quiet=True)
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "run")] == ["4", "5", "6"]


def test_pruning_takes_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("step-00000001", "step-00000002", "step-best", "notes", ".step-00000003.incomplete-7"):
        (folder / name).mkdir(parents=True)
    prune_checkpoints(tmp_path, keep_last=1)
    remove_remains(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "step-00000002", "step-best"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_disk_full_leaves_the_former_checkpoint_usable(
    make_config: MakeConfig, tmp_path: Path, asynchronous: bool
) -> None:
    config = make_config(f"checkpoint={{every_steps: 2, asynchronous: {asynchronous}, when_busy: wait}}")
    whole = train(config, tmp_path / "whole", quiet=True)
    written = write_contents

    def full_at_step_four(directory: Path, contents: CheckpointContents, **options: Any) -> None:
        if contents.state.step < 4:
            return written(directory, contents, **options)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with mock.patch("torch.distributed.checkpoint.filesystem._write_item", side_effect=full):
            return written(directory, contents, **options)

    with (
        mock.patch("tokenformer.train.checkpoint.writer.write_contents", full_at_step_four),
        pytest.raises(TokenFormerError) as caught,
    ):
        train(config, tmp_path / "run", quiet=True)
    assert "step-00000004: could not be written (No space left on device)" in str(caught.value)
    assert "step-00000002 is whole: go on from it with --resume" in str(caught.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    resumed = train(config, tmp_path / "run", resume=True, quiet=True)
    one, two = (result.model / "model.safetensors" for result in (resumed, whole))
    assert one.read_bytes() == two.read_bytes()


def test_a_real_limit_of_the_file_system(checkpoint: Path, tmp_path: Path) -> None:
    """The operating system refuses to let a file grow: the same message, and nothing is left behind."""
    code = """
import resource, signal, sys
from tokenformer.errors import TokenFormerError
from tokenformer.train.checkpoint.contents import read_checkpoint, write_checkpoint
checkpoint = read_checkpoint(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    write_checkpoint(sys.argv[2], checkpoint)
except TokenFormerError as error:
    print(error)
"""
    target = tmp_path / "limited" / "step-00000003"
    run: Any = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint), str(target)], capture_output=True, text=True, check=True
    )
    assert f"{target}: could not be written" in run.stdout
    assert list(target.parent.iterdir()) == []


def test_milestones_are_kept_for_good(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("checkpoint={every_steps: 1, keep_last: 1, keep_every_steps: 2}")
    train(config, tmp_path / "run", quiet=True)
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "run")] == ["2", "4", "6"]


def test_moments_that_should_be_there_are_missed(checkpoint: Path, reseal: Callable[[Path], None]) -> None:
    """Only what a checkpoint says was fresh may come without an optimiser's state."""
    record = checkpoint / "optimizer.json"
    record.write_text(json.dumps({"format_version": 1, "without_moments": ["embedding.weight"]}))
    reseal(checkpoint)
    with pytest.raises(TokenFormerError, match=r"embedding.weight: found optimiser state, expected none"):
        read_checkpoint(checkpoint)


def test_fresh_groups_alone_have_no_moments(checkpoint: Path, tmp_path: Path) -> None:
    grow_directory(checkpoint, tmp_path / "grown", GrowthSpec(factor=2))
    fresh = json.loads((tmp_path / "grown" / "optimizer.json").read_text())["without_moments"]
    grown = read_checkpoint(tmp_path / "grown")
    parameters = {name for name, _ in grown.model.named_parameters()}
    assert set(fresh) == parameters - grown.moments.keys()
    assert fresh
    assert all(name.endswith(("key_tokens.1", "value_tokens.1")) for name in fresh)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit flip": flip_a_bit,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
}


@pytest.fixture(scope="module")
def three_checkpoints(
    data_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:  # filled by the first test that has a configuration
    return {}


@pytest.fixture
def run(
    make_config: MakeConfig, three_checkpoints: dict[str, Path], tmp_path: Path
) -> tuple[Path, RunConfig]:
    """A copy of a finished run with the checkpoints of steps 2, 4 and 6, and its configuration."""
    config = make_config("checkpoint={every_steps: 2, keep_last: 3}")
    if not three_checkpoints:
        three_checkpoints["run"] = train(config, tmp_path / "original" / "run", quiet=True).out
    return Path(shutil.copytree(three_checkpoints["run"], tmp_path / "copy")), config


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["tensors/__0_0.distcp", "tensors/.metadata", "state.json", "manifest.json", "run.yaml"]
)
def test_damage_is_found_and_named(run: tuple[Path, RunConfig], name: str, damage: str) -> None:
    newest = list_checkpoints(run[0])[-1]
    DAMAGES[damage](newest / name)
    found = find_newest_whole(run[0])
    assert found.path == list_checkpoints(run[0])[-2]
    assert list(found.damaged) == [newest]
    # a bit of the manifest itself is either no JSON any more, or no longer what some file is
    assert str(newest if name == "manifest.json" else newest / name) in found.damaged[newest]


def test_checkpoint_of_another_time_is_no_part(run: tuple[Path, RunConfig]) -> None:
    """Mixed checkpoints: the tensors of one with the counters of another."""
    *_, older, newest = list_checkpoints(run[0])
    shutil.copyfile(older / "tensors" / "__0_0.distcp", newest / "tensors" / "__0_0.distcp")
    with pytest.raises(DamagedCheckpointError, match=r"__0_0.distcp: changed since it was written"):
        require_whole(newest)
    shutil.copyfile(older / "tensors" / "__0_0.distcp", newest / "tensors" / "__1_0.distcp")
    with pytest.raises(DamagedCheckpointError, match=r"__1_0.distcp: does not belong to this checkpoint"):
        require_whole(newest)


def test_run_goes_on_from_the_one_before_a_damaged_one(
    run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = run
    weights = (out / "model" / "model.safetensors").read_bytes()
    flip_a_bit(list_checkpoints(out)[-1] / "tensors" / "__0_0.distcp")
    result = train(config, out, resume=True)
    said = capsys.readouterr().out
    assert "step-00000006/tensors/__0_0.distcp: changed since it was written" in said
    assert "kept as step-00000006.damaged, and its steps since step-00000004 are trained again" in said
    assert result.state.step == 6
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    assert [path.name for path in list_checkpoints(out)][-1] == "step-00000006"


def test_no_whole_checkpoint_names_each(run: tuple[Path, RunConfig]) -> None:
    out, config = run
    for path in list_checkpoints(out):
        flip_a_bit(path / "tensors" / "__0_0.distcp")
    before = sorted(out.rglob("*"))
    with pytest.raises(TokenFormerError, match="none of its checkpoints is whole") as caught:
        train(config, out, resume=True, quiet=True)
    assert all(str(path) in str(caught.value) for path in list_checkpoints(out))
    assert sorted(out.rglob("*")) == before


def test_inspect_says_whether_a_checkpoint_is_whole(run: tuple[Path, RunConfig]) -> None:
    checkpoint = list_checkpoints(run[0])[-1]
    assert inspect_path(checkpoint).data["damage"] is None
    flip_a_bit(checkpoint / "tensors" / "__0_0.distcp")
    assert "__0_0.distcp: changed" in inspect_path(checkpoint).data["damage"]


def test_damaged_source_of_a_new_run_is_refused(run: tuple[Path, RunConfig], make_config: MakeConfig) -> None:
    checkpoint = list_checkpoints(run[0])[-1]
    flip_a_bit(checkpoint / "tensors" / "__0_0.distcp")
    out = run[0].parent / "next"
    with pytest.raises(DamagedCheckpointError):
        train(make_config(model=None, init_from=str(checkpoint)), out, quiet=True)
    assert not out.exists()
