"""Blocks as Ray tasks on a local cluster: the files of a local run, also when workers die."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenformer.errors import TokenFormerError
from tokenformer.language.preparation import blocks
from tokenformer.language.preparation.engines import LocalEngine
from tokenformer.language.preparation.ray_engine import RayEngine
from tokenformer.language.prepare import prepare

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three workers of this machine."""
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(500)]
    texts = (" ".join(draw.choices(words, k=100)) for _ in range(400))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "corpus.jsonl"


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.slow
def test_the_files_are_those_of_a_local_run_while_workers_are_killed(
    cluster: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 5_000)
    options: dict = {"tokenizer": "bpe:300", "shard_tokens": 50_000}
    prepare([corpus], tmp_path / "local", engine=LocalEngine(1), **options)
    killed: list[int] = []
    done = threading.Event()

    def kill_workers() -> None:
        while not done.is_set() and len(killed) < 2:
            killed.extend(kill_a_worker())
            time.sleep(0.3)

    killer = threading.Thread(target=kill_workers)
    killer.start()
    try:
        prepare([corpus], tmp_path / "ray", engine=RayEngine(), **options)
    finally:
        done.set()
        killer.join()
    assert killed
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    assert cluster.is_initialized()  # it was not ours to shut down


def kill_a_worker() -> list[int]:
    """Kill one process of this machine that works on one of our tasks."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().startswith(b"ray::_apply"):
                os.kill(int(process.name), signal.SIGKILL)
                return [int(process.name)]
        except (OSError, ProcessLookupError):
            continue
    return []


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_task_whose_worker_dies_is_repeated(tmp_path: Path) -> None:
    def die_once(place: Path) -> str:
        if not place.exists():
            place.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return place.name

    places = [(number, tmp_path / f"{number}") for number in range(3)]
    assert list(RayEngine().map_ordered(die_once, places)) == [(0, "0"), (1, "1"), (2, "2")]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_errors_of_tasks_come_through_without_a_trace() -> None:
    def fail(argument: int) -> None:
        raise TokenFormerError(f"broken {argument}")

    with pytest.raises(TokenFormerError, match=r"^broken 1$"):
        list(RayEngine().map_ordered(fail, [(0, 1)]))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_cluster_without_this_package_is_an_error() -> None:
    with pytest.raises(TokenFormerError, match="the same version of tokenformer on every machine"):
        list(RayEngine().map_ordered(_of_a_module_that_workers_do_not_have, [(0, 1)]))


def _of_a_module_that_workers_do_not_have(argument: int) -> None:
    raise AssertionError


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9", "nowhere.invalid:1", "127.0.0.1:port"):
        with pytest.raises(TokenFormerError, match=f"ray: no cluster at {address} "):
            list(RayEngine(address).map_ordered(abs, [(0, -1)]))


@pytest.mark.slow
def test_a_cluster_of_its_own() -> None:
    ray.shutdown()
    assert list(RayEngine().map_ordered(abs, [(0, -1)])) == [(0, 1)]
    assert not ray.is_initialized()
