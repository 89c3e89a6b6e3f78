"""Checkpoints written by a process beside the training: the same files, and what comes of it where one is killed."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tokenformer.errors import TokenFormerError
from tokenformer.growth.grow import grow_model
from tokenformer.growth.spec import GrowthSpec
from tokenformer.models.directory import load_model
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.train.checkpoint import worker as worker_module
from tokenformer.train.checkpoint.contents import TrainingCheckpoint, read_checkpoint
from tokenformer.train.checkpoint.folder import checkpoint_path, list_checkpoints
from tokenformer.train.checkpoint.manifest import require_whole
from tokenformer.train.checkpoint.shared_memory import SharedMemory, lay_out
from tokenformer.train.checkpoint.staging import Staging
from tokenformer.train.checkpoint.worker import Worker
from tokenformer.train.checkpoint.writer import CheckpointWriter
from tokenformer.train.sections import CheckpointConfig
from tokenformer.train.state import TrainingState

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory without a name is Linux's")

ALL = CheckpointConfig(keep_last=99)


def config_of(*, hidden: int, ffn: int) -> TokenFormerConfig:
    return TokenFormerConfig(
        vocab_size=384,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        qkv_param_tokens=8,
        proj_param_tokens=8,
        ffn_param_tokens=ffn,
        max_position_embeddings=32,
    )


def checkpoint_of(
    step: int, *, factor: float = 1.0, hidden: int = 16, ffn: int = 16, device: str = "cpu"
) -> TrainingCheckpoint:
    """Of a model all its own, with moments and a generator's state."""
    model = build_model(config_of(hidden=hidden, ffn=ffn), seed=step).to(device)
    if factor != 1:
        model = grow_model(model, GrowthSpec(factor=factor), seed=step).model
    moments = {
        name: {
            "exp_avg": torch.randn_like(p),
            "exp_avg_sq": torch.rand_like(p),
            "step": torch.tensor(float(step)),
        }
        for name, p in model.named_parameters()
    }
    return TrainingCheckpoint(model, moments, TrainingState(step=step), rng={"cpu": torch.get_rng_state()})


def overwrite(checkpoint: TrainingCheckpoint) -> None:
    for tensor in checkpoint.contents().tensors.values():
        tensor.zero_()


def files(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def worker_of(writer: CheckpointWriter, *, other_than: int | None = None) -> int:
    """The process that writes, once it has begun."""
    assert writer._background is not None
    worker = writer._background.writing
    assert worker is not None
    wait_until(lambda: worker.pid not in (None, other_than))
    assert worker.pid is not None
    return worker.pid


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory, said: list[str]) -> Iterator[CheckpointWriter]:
    """One for all tests, which write to its run one after the other: a process takes seconds to begin."""
    run = tmp_path_factory.mktemp("process") / "run"
    with closing(CheckpointWriter(run, mode="process", say=said.append)) as writer:
        yield writer


def test_the_files_are_those_of_any_writer(writer: CheckpointWriter, tmp_path: Path) -> None:
    """Byte for byte, for tensors as they were when they were handed over; also after growth."""
    for step, factor in ((1, 1.0), (2, 1.0), (3, 3.0)):
        checkpoint = checkpoint_of(step, factor=factor)
        CheckpointWriter(tmp_path).write(checkpoint, ALL)
        writer.write(checkpoint, ALL, card="A card." if step == 3 else None)
        overwrite(checkpoint)
        writer.finish()
        one, other = checkpoint_path(tmp_path, step), checkpoint_path(writer.run, step)
        require_whole(other)
        assert files(one) == files(other)
    exported = load_model(writer.run / "model").state_dict()
    expected = read_checkpoint(checkpoint_path(tmp_path, 3)).model.state_dict()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in expected.items())


def test_killed_it_is_started_again_and_nothing_is_lost(writer: CheckpointWriter, said: list[str]) -> None:
    os.kill(worker_of(writer), signal.SIGSTOP)  # so that it is in the middle of its work
    checkpoint = checkpoint_of(4)
    expected = {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}
    writer.write(checkpoint, ALL)
    overwrite(checkpoint)
    assert writer.is_writing()
    os.kill(worker_of(writer), signal.SIGKILL)
    writer.finish()
    found = read_checkpoint(checkpoint_path(writer.run, 4)).model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert said == ["the process that writes checkpoints was killed by SIGKILL; it is started once more"]


def test_signals_for_the_run_do_not_end_it(writer: CheckpointWriter) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker_of(writer), number)
    writer.write(checkpoint_of(5), ALL)
    writer.finish()
    require_whole(checkpoint_path(writer.run, 5))


def test_killed_twice_ends_the_run_with_the_former_checkpoint_named(tmp_path: Path) -> None:
    said: list[str] = []
    with closing(CheckpointWriter(tmp_path, mode="process", say=said.append)) as writer:
        CheckpointWriter(tmp_path).write(checkpoint_of(1), ALL)
        writer.write(checkpoint_of(2), ALL)
        first = worker_of(writer)
        os.kill(first, signal.SIGKILL)
        os.kill(worker_of(writer, other_than=first), signal.SIGKILL)
        with pytest.raises(
            TokenFormerError, match=r"SIGKILL and then was killed by SIGKILL.*step-00000001 is whole"
        ):
            writer.finish()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_what_the_disk_refuses_is_raised_here(writer: CheckpointWriter) -> None:
    """A real limit, of the process alone."""
    resource.prlimit(worker_of(writer), resource.RLIMIT_FSIZE, (30_000, 30_000))
    writer.write(checkpoint_of(6), ALL)
    with pytest.raises(
        TokenFormerError,
        match=r"step-00000006: could not be written \(File too large\).*step-00000005 is whole",
    ):
        writer.finish()
    assert list_checkpoints(writer.run)[-1].name == "step-00000005"
    assert not list((writer.run / "checkpoints").glob(".*"))


def test_what_a_call_raises_is_raised_here() -> None:
    with closing(Worker("is tested")) as worker:
        with pytest.raises(FileNotFoundError, match="no such place"):
            worker.call(os.listdir, "no such place")
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            worker.call(divmod, 1, 0)
        assert worker.call(divmod, 7, 2) == (3, 1)


def test_one_that_does_nothing_yet_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "takes_a_minute.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(worker_module, "_PATIENCE", 60.0)
    before = time.monotonic()
    with closing(Worker("is tested", "takes_a_minute")) as worker:
        worker.start()
    assert worker.pid is None
    assert time.monotonic() - before < 30


@pytest.mark.parametrize("end", ["closed", "dropped", "larger"])
def test_locked_pages_are_unlocked_while_they_are_there(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that stay registered pass for page-locked when something else lies there, which devices then do not
    see: they copy from the former pages."""
    registered: dict[int, int] = {}

    def unregister(address: int) -> int:
        size = registered.pop(address)
        lines = [
            line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:tokenformer" in line
        ]
        ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in lines]
        assert any(start <= address and address + size <= stop for start, stop in ranges)
        return 0

    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: registered.update({address: size}) or 0,
        cudaHostUnregister=unregister,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = SharedMemory()
    tensors = memory.tensors(lay_out({"weight": torch.empty(3000)}))
    memory.lock_pages()
    assert list(registered) == [tensors["weight"].data_ptr()]
    if end == "larger":
        memory.tensors(lay_out({"weight": torch.empty(3_000_000)}))
    elif end == "closed":
        memory.close()
    else:
        os.close(memory.descriptor)
        del memory, tensors
        gc.collect()
    assert not registered


def test_it_ends_with_the_training_process() -> None:
    """Also in the middle of a call, and although a forked child holds the connection open."""
    code = """
import os, signal, threading, time
from tokenformer.train.checkpoint.worker import Worker
worker = Worker("is tested")
threading.Thread(target=worker.call, args=(time.sleep, 600), daemon=True).start()
while worker.pid is None:
    time.sleep(0.01)
forked = os.fork()
if forked == 0:
    time.sleep(30)
    os._exit(0)
print(worker.pid, forked, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    pid, forked = map(int, run.stdout.readline().split())
    assert run.wait() == -signal.SIGKILL
    try:
        wait_until(lambda: not is_alive(pid))
    finally:
        os.kill(forked, signal.SIGKILL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_next_update_waits_for_the_copy(tmp_path: Path) -> None:
    """The device copies beside the computation; an optimiser that updates at once does not change the checkpoint."""
    model = torch.nn.Linear(8192, 8192).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
    memory = SharedMemory()
    staging = Staging(memory)
    optimizer.register_step_pre_hook(lambda *_: staging.hold_updates())
    for _ in range(5):
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        staging.copy(model.state_dict())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        staging.wait()
        assert all(torch.equal(staging.copies[name], tensor.cpu()) for name, tensor in expected.items())
    staging.copies = {}
    memory.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_device_are_written_alike(tmp_path: Path) -> None:
    """At once and by the process, several files side by side, and again when they have become larger."""
    runs = [tmp_path / "at once", tmp_path / "process"]
    with (
        closing(CheckpointWriter(runs[0])) as waiting,
        closing(CheckpointWriter(runs[1], mode="process")) as beside,
    ):
        for step, ffn in ((1, 16384), (2, 20480)):
            checkpoint = checkpoint_of(step, hidden=1024, ffn=ffn, device="cuda")
            for writer in (waiting, beside):
                writer.write(checkpoint, ALL)
                writer.before_update()
                torch.cuda.current_stream().synchronize()
            overwrite(checkpoint)
            beside.finish()
            one, other = (checkpoint_path(run, step) for run in runs)
            assert len(list(one.glob("tensors/*.distcp"))) > 1
            assert files(one) == files(other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_lies_there_later_does_not_pass_for_page_locked() -> None:
    """The system gives the same addresses to the next who asks for as much."""
    layout = lay_out({"weight": torch.empty(2**24)})
    memory = SharedMemory()
    weight = memory.tensors(layout)["weight"]
    memory.lock_pages()
    assert weight.is_pinned()
    os.close(memory.descriptor)
    del memory, weight
    gc.collect()
    with closing(SharedMemory()) as later:
        weight = later.tensors(layout)["weight"].fill_(7)
        assert not weight.is_pinned()
        assert bool((weight.to("cuda", non_blocking=True) == 7).all())
        del weight


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
