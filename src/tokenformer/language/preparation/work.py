"""The work directory beside the output: who is at work, what on, and how far it is."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pydantic import Field

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_json, write_json
from tokenformer.language.data_directory import Count, SplitRule
from tokenformer.language.preparation.sharding import Written
from tokenformer.validation import StrictModel, validate

SourceFiles = dict[str, tuple[int, int]]
"""Size and modification time (ns) of each file that is read."""


class Plan(StrictModel):
    """What is asked for. Work on another plan, or on sources that have changed since, cannot go on."""

    format_version: int = 1
    options: dict[str, Any]
    files: SourceFiles

    def difference(self, other: Plan) -> str | None:
        """What differs, in words; None where nothing does."""
        names = sorted(self.options.keys() | other.options.keys())
        options = [name for name in names if self.options.get(name) != other.options.get(name)]
        if self.format_version != other.format_version or options:
            return f"the options have changed ({', '.join(options) or 'format_version'})"
        changed = sorted(dict(self.files.items() ^ other.files.items()))
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            return f"the sources have changed ({changed[0]}{more})"
        return None


class Progress(StrictModel):
    """How far the work is: the ``documents`` of the first ``blocks`` are on the disk.

    ``rule`` says how documents are divided, and ``surveyed_bytes`` how many UTF-8 bytes there are, where that had to
    be found out; ``position`` is the reader's; ``sealed`` means that all tokens are written.
    """

    rule: SplitRule
    surveyed_bytes: Count | None
    blocks: Count = 0
    position: tuple[Count, Count, Count] = (0, 0, 0)
    skipped: dict[str, Count] = Field(default_factory=dict)
    documents: Count = 0
    utf8_bytes: dict[str, Count] = Field(default_factory=dict)
    splits: dict[str, Written] = Field(default_factory=dict)
    sealed: bool = False


class WorkDirectory:
    """The files of work that is under way."""

    def __init__(self, path: Path, new_folders: Sequence[Path] = ()) -> None:
        self.path = path
        self._new_folders = new_folders
        self.data = path / "data"
        self.notes = path / "notes"
        self.digests = path / "digests"
        self.tokenizer = path / "tokenizer"
        self._plan, self._progress = path / "plan.json", path / "progress.json"

    def begin(self, plan: Plan) -> None:
        """Start from nothing."""
        for inner in (self.data, self.notes, self.tokenizer):
            shutil.rmtree(inner, ignore_errors=True)
        for file in (self._progress, self.digests):
            file.unlink(missing_ok=True)
        self.data.mkdir()
        self.notes.mkdir()
        write_json(self._plan, plan.model_dump(mode="json"))

    def plan(self) -> Plan | None:
        """The plan of the work that lies here; None where there is none, or none that can be read."""
        return _read(Plan, self._plan)

    def progress(self) -> Progress | None:
        """How far it is; None before the first record."""
        return _read(Progress, self._progress)

    def record(self, progress: Progress) -> None:
        """Replace the record of progress; what it speaks of must be on the disk."""
        write_json(self._progress, progress.model_dump(mode="json"))

    def remove(self) -> None:
        """Delete all of it, and the folders that were made for it."""
        for inner in (self.data, self.notes, self.tokenizer):
            shutil.rmtree(inner, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._new_folders:
            with suppress(OSError):  # something else is in it
                folder.rmdir()

    def resume(self, plan: Plan, say: Callable[[str], None]) -> Progress | None:
        """What was done of ``plan``; None where there is nothing to go on from, and ``say`` hears why."""
        before, progress = self.plan(), self.progress()
        if before is None:
            return None
        difference = before.difference(plan)
        if difference is None and progress is not None and self.data.is_dir():
            if progress.blocks:
                say(f"continues at block {progress.blocks + 1} ({progress.documents:,} documents are done)")
            return progress
        if progress is not None and progress.blocks:
            say(f"{self.path}: {difference or 'its record is damaged'}: starts over")
        return None


def _read(model: type[Any], path: Path) -> Any:
    try:
        return validate(model, read_json(path, "a record of work"), source=str(path))
    except TokenFormerError:  # written by another version, or not at all
        return None


def work_path(out: Path) -> Path:
    """Where the work on ``out`` lies: beside it, hidden."""
    return out.with_name(f".{out.name}.preparing")


@contextmanager
def work_directory(out: Path) -> Iterator[WorkDirectory]:
    """The work directory of ``out`` for as long as the block runs; nobody else can have it meanwhile.

    Raises:
        TokenFormerError: another process is at work on ``out``.
    """
    path = work_path(out)
    new_folders = [folder for folder in path.parents if not folder.exists()]
    lock = _lock(path, out)
    try:
        yield WorkDirectory(path, new_folders)
    finally:
        lock.close()


def _lock(path: Path, out: Path) -> IO[str]:
    while True:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / "lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise TokenFormerError(
                f"{out}: is being prepared by another process{f' ({holder})' if holder else ''}; wait for it or "
                "name another output"
            ) from None
        if _is_current(file, path / "lock"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
            return file
        file.close()  # its holder finished, and removed it, after it was opened here


def _is_current(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def describe_files(paths: Iterator[Path]) -> SourceFiles:
    """Size and modification time of each file.

    Raises:
        TokenFormerError: one that cannot be read.
    """
    found: SourceFiles = {}
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise TokenFormerError(f"{path}: cannot be read ({error.strerror})") from error
        found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found
