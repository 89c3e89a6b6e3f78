"""Work that is killed at any moment, and goes on to the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokenformer.errors import TokenFormerError
from tokenformer.language.preparation import blocks, tokenizing
from tokenformer.language.preparation.engines import LocalEngine
from tokenformer.language.preparation.work import WorkDirectory, work_directory
from tokenformer.language.prepare import prepare
from tokenformer.language.rules import DocumentRules
from tokenformer.language.store_writer import TokenStoreWriter


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 400)
    monkeypatch.setattr(tokenizing, "COMMIT_SECONDS", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files with duplicates, empty texts and broken lines; about 12 blocks."""
    draw = random.Random(0)
    path = tmp_path / "corpus"
    path.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        lines = []
        for _ in range(60):
            text = f"text {draw.randrange(80)} " + "größe " * draw.randrange(12)
            broken = draw.random()
            lines.append("{" if broken < 0.1 else json.dumps({"text": "" if broken < 0.2 else text}))
        (path / name).write_text("\n".join([*lines, "{"]))
    (path / "c.bin").write_bytes(b"\0")
    return path


Prepare = Callable[..., None]
BPE = {"tokenizer": "bpe:300", "shard_tokens": 300}


@pytest.fixture
def prepare_folder(folder: Path) -> Prepare:
    rules = DocumentRules(deduplicate=True, on_error="skip")

    def call(out: Path, **options: object) -> None:
        chosen: dict = {"rules": rules, "shard_tokens": 1500, "engine": LocalEngine(1)} | options
        prepare([folder], out, **chosen)

    return call


def in_a_child(work: Callable[[], None]) -> int:
    """Do ``work`` in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class _Events:
    """Counts what reaches the disk, and kills this process at one of these moments."""

    PLACES = (
        (os, "fsync"),
        (Path, "replace"),
        (Path, "rename"),
        (Path, "unlink"),
        (shutil, "rmtree"),
        (TokenStoreWriter, "add_documents"),
        (TokenStoreWriter, "close"),
        (WorkDirectory, "record"),
    )

    def __init__(self, fatal: int | None) -> None:
        self.count, self._fatal = 0, fatal
        for owner, name in self.PLACES:
            setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Callable) -> Callable:  # type: ignore[type-arg]
        def call(*arguments: object, **options: object) -> object:
            result = function(*arguments, **options)
            self.count += 1
            if self.count == self._fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call


def count_events(work: Callable[[], None], path: Path) -> int:
    def counted() -> None:
        events = _Events(None)
        work()
        path.write_text(str(events.count))

    assert in_a_child(counted) == 0
    return int(path.read_text())


def kill_at(moment: int, work: Callable[[], None]) -> int:
    def doomed() -> None:
        _Events(moment)
        work()

    return in_a_child(doomed)


def moments(total: int, most: int) -> Iterator[int]:
    """All moments, or a fixed random choice with the last ones, where finished work gets its name."""
    chosen = range(1, total + 1)
    if total > most:
        chosen = sorted({*random.Random(1).sample(chosen, most - 7), *chosen[-7:]})
    yield from chosen


@pytest.mark.parametrize(
    ("options", "most"),
    [
        pytest.param({}, 24, id="bytes"),
        pytest.param(BPE, 12, id="bpe"),
        pytest.param({}, 10_000, id="bytes, every moment", marks=pytest.mark.slow),
        pytest.param(BPE, 10_000, id="bpe, every moment", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_files(
    prepare_folder: Prepare, tmp_path: Path, options: dict[str, object], most: int
) -> None:
    prepare_folder(tmp_path / "expected", **options)
    expected = files_of(tmp_path / "expected")
    assert any(name.startswith("train-00002-of-0000") for name in expected)
    total = count_events(lambda: prepare_folder(tmp_path / "counted", **options), tmp_path / "count")
    assert total > 60
    for moment in moments(total, most):
        out = tmp_path / f"out-{moment}"
        assert kill_at(moment, lambda out=out: prepare_folder(out, **options)) == -signal.SIGKILL
        work = out.with_name(f".{out.name}.preparing")
        assert work.exists() or moment == total
        if work.exists():
            assert in_a_child(lambda out=out: prepare_folder(out, **options)) == 0
        assert files_of(out) == expected, f"killed at moment {moment} of {total}"
        assert not work.exists()


def test_killed_again_and_again_it_gets_to_the_end(prepare_folder: Prepare, tmp_path: Path) -> None:
    prepare_folder(tmp_path / "expected")
    out, killed = tmp_path / "out", 0
    while kill_at(25, lambda: prepare_folder(out)) == -signal.SIGKILL:
        killed += 1
        assert killed < 30
    assert killed > 2
    assert files_of(out) == files_of(tmp_path / "expected")


class TestContinuing:
    @pytest.fixture
    def interrupted(self, prepare_folder: Prepare, tmp_path: Path) -> Path:
        assert kill_at(70, lambda: prepare_folder(tmp_path / "out")) == -signal.SIGKILL
        return tmp_path / "out"

    def test_it_says_where_it_goes_on_and_repeats_nothing(
        self, interrupted: Path, prepare_folder: Prepare, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recorded = json.loads((interrupted.with_name(".out.preparing") / "progress.json").read_text())
        done = recorded["blocks"]
        assert done > 2
        items = []
        work = LocalEngine.map_ordered

        def watched(self: LocalEngine, function: Callable, arguments: Iterator) -> Iterator:
            return work(self, function, (items.append(item) or item for item in arguments))

        monkeypatch.setattr(LocalEngine, "map_ordered", watched)
        notes: list[str] = []
        prepare_folder(interrupted, say=notes.append)
        assert notes == [f"continues at block {done + 1} ({recorded['documents']} documents are done)"]
        prepare_folder(interrupted.with_name("whole"))
        repeated = len(items)
        assert 2 * done < repeated < 3 * done + 30
        assert [len(block.digests) for block, _ in items]  # blocks, not documents, were counted

    def test_other_options_start_over(self, interrupted: Path, prepare_folder: Prepare) -> None:
        notes: list[str] = []
        other = DocumentRules(min_length=30, on_error="skip")
        prepare_folder(interrupted, rules=other, say=notes.append)
        assert len(notes) == 1
        assert notes[0].endswith(".out.preparing: the options have changed (rules): starts over")
        prepare_folder(interrupted.with_name("fresh"), rules=other)
        assert files_of(interrupted) == files_of(interrupted.with_name("fresh"))

    @pytest.mark.parametrize("change", ["content", "time", "another file"])
    def test_changed_sources_start_over(
        self, interrupted: Path, prepare_folder: Prepare, folder: Path, change: str
    ) -> None:
        changed = folder / ("d.jsonl" if change == "another file" else "b.jsonl")
        if change == "time":
            os.utime(changed, ns=(1, 1))
        else:
            with changed.open("a") as file:
                file.write('\n{"text": "late"}\n')
        notes: list[str] = []
        prepare_folder(interrupted, say=notes.append)
        assert len(notes) == 1
        assert notes[0].endswith(f": the sources have changed ({changed}): starts over")
        prepare_folder(interrupted.with_name("fresh"))
        assert files_of(interrupted) == files_of(interrupted.with_name("fresh"))

    @pytest.mark.parametrize("name", ["progress.json", "plan.json"])
    def test_a_damaged_record_starts_over(
        self, interrupted: Path, prepare_folder: Prepare, name: str
    ) -> None:
        (interrupted.with_name(".out.preparing") / name).write_text("{")
        prepare_folder(interrupted)
        prepare_folder(interrupted.with_name("fresh"))
        assert files_of(interrupted) == files_of(interrupted.with_name("fresh"))

    def test_missing_data_is_an_error(self, interrupted: Path, prepare_folder: Prepare) -> None:
        data = interrupted.with_name(".out.preparing") / "data"
        for file in data.glob("train-*.bin"):
            os.truncate(file, 10)
        with pytest.raises(TokenFormerError, match=r"train-0000\d\.bin: truncated: found 10 bytes, expected"):
            prepare_folder(interrupted)


def test_one_at_a_time(prepare_folder: Prepare, tmp_path: Path) -> None:
    with work_directory(tmp_path / "out"):
        message = rf"out: is being prepared by another process \(process {os.getpid()} on "
        with pytest.raises(TokenFormerError, match=message):
            prepare_folder(tmp_path / "out")
    prepare_folder(tmp_path / "out")


def test_the_tokenizer_is_trained_once(
    prepare_folder: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TokenStoreWriter, *arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(TokenStoreWriter, "add_documents", full)
        with pytest.raises(
            TokenFormerError, match=r"\(No space left on device\); the trained tokenizer kept in"
        ):
            prepare_folder(tmp_path / "out", tokenizer="bpe:300")
    monkeypatch.setattr("tokenformer.language.prepare.train_bpe", None)
    prepare_folder(tmp_path / "out", tokenizer="bpe:300")


def test_a_full_disk_keeps_what_is_done(
    prepare_folder: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    add = TokenStoreWriter.add_documents

    def limited(self: TokenStoreWriter, tokens, sizes) -> None:  # type: ignore[no-untyped-def]
        nonlocal written
        written += len(tokens)
        if written > 1500:
            raise OSError(28, "No space left on device")
        add(self, tokens, sizes)

    with monkeypatch.context() as patched:
        patched.setattr(TokenStoreWriter, "add_documents", limited)
        message = r"out: could not be written \(No space left on device\); \d+ finished blocks kept in .*\.out\.prep"
        with pytest.raises(TokenFormerError, match=message):
            prepare_folder(tmp_path / "out")
    notes: list[str] = []
    prepare_folder(tmp_path / "out", say=notes.append)
    assert notes[0].startswith("continues at block ")
    prepare_folder(tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_ctrl_c_keeps_what_is_done(
    prepare_folder: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = WorkDirectory.record

    def interrupt(self: WorkDirectory, progress) -> None:  # type: ignore[no-untyped-def]
        record(self, progress)
        if progress.blocks == 3:
            raise KeyboardInterrupt

    notes: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(WorkDirectory, "record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(tmp_path / "out", say=notes.append)
    kept = tmp_path / ".out.preparing"
    assert notes == [f"interrupted; 3 finished blocks kept in {kept}: the same command goes on from there"]
    prepare_folder(tmp_path / "out", say=notes.append)
    assert notes[1].startswith("continues at block 4")


_DRIVER = """
import sys
from tokenformer.cli.main import main
from tokenformer.language.preparation import blocks, tokenizing

if __name__ == "__main__":
    blocks.BLOCK_CHARACTERS, tokenizing.COMMIT_SECONDS = 10_000, 0
    main()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
def test_the_command_is_killed_with_its_workers_and_goes_on(tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out"
    draw = random.Random(2)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(2000)]
    texts = (" ".join(draw.choices(words, k=300)) for _ in range(300))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([corpus], tmp_path / "bpe", tokenizer="bpe:300", engine=LocalEngine(1))
    (tmp_path / "driver.py").write_text(_DRIVER)
    arguments = ["prepare", corpus, "--out", out, "--tokenizer", tmp_path / "bpe" / "tokenizer.json"]
    command = [sys.executable, tmp_path / "driver.py", *arguments, "--workers", "2"]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    progress = tmp_path / ".out.preparing" / "progress.json"
    try:
        wait_for(lambda: progress.is_file() and json.loads(progress.read_text())["blocks"] > 3)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    finally:
        running.kill()
        running.wait()
    assert len(children) >= 2
    wait_for(lambda: not any(Path(f"/proc/{child}/cmdline").is_file() and alive(child) for child in children))
    assert not out.exists()
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "continues at block " in finished.stderr
    expected = files_of(tmp_path / "bpe") | {"dataset.json": b""}
    assert files_of(out) | {"dataset.json": b""} == expected


def alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)
