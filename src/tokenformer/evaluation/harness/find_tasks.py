"""Names of tasks to tasks of the harness: its own, those of local files, and ``NAME=FILE`` for one on local data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.tasks import TaskManager

from tokenformer.errors import TokenFormerError
from tokenformer.validation import nearest

LOCAL_TASKS = ("lambada_jsonl",)
"""Tasks of ours that read a local file, given as ``NAME=FILE``."""


def find_tasks(
    names: Sequence[str], include_paths: Sequence[Path] = ()
) -> tuple[TaskManager, list[str | dict[str, Any]]]:
    """The manager that knows the tasks, and what it is to load.

    Args:
        names: tasks, groups or tags of the harness, names of ``include_paths``, or ``lambada_jsonl=FILE``.
        include_paths: folders with task files (YAML in the harness's form).

    Raises:
        TokenFormerError: an unknown name (with the nearest known one), a missing file or folder.
    """
    for folder in include_paths:
        if not folder.is_dir():
            raise TokenFormerError(f"--include-path: {folder}: no such folder; expected one with task files")
    wanted = [_local_task(name) if "=" in name else name for name in names]
    own = [name for name in wanted if isinstance(name, str)]
    manager = _manager(own, list(include_paths))
    unknown = [name for name in own if name not in manager.task_index]
    if unknown:
        raise TokenFormerError(
            f"tasks: '{unknown[0]}' is no task of the harness{nearest(unknown[0], manager.all_tasks)}"
        )
    return manager, wanted


def _local_task(name: str) -> dict[str, Any]:
    task, _, file = name.partition("=")
    if task not in LOCAL_TASKS:
        raise TokenFormerError(f"tasks: '{name}': '{task}' reads no local file{nearest(task, LOCAL_TASKS)}")
    if not Path(file).is_file():
        raise TokenFormerError(f"tasks: {task}: {file}: no such file")
    definition: dict[str, Any] = yaml.safe_load(
        (files(__package__) / "tasks" / f"{task}.yaml").read_text("utf-8")
    )
    return definition | {"dataset_kwargs": {"data_files": {"test": str(Path(file).resolve())}}}


def _manager(names: Sequence[str], include_paths: list[Path]) -> TaskManager:
    """One that knows at least ``names``. Reading all of the harness's task files takes many seconds, so that only
    the folders of the named ones are read where that is enough."""
    local = TaskManager(include_path=include_paths, include_defaults=False)
    missing = [name for name in names if name not in local.task_index]
    if not missing:
        return local
    folders = _folders_of(missing)
    narrow = TaskManager(include_path=[*folders, *include_paths], include_defaults=False)
    if all(name in narrow.task_index for name in missing):
        return narrow
    return TaskManager(include_path=include_paths)


def _folders_of(names: Sequence[str]) -> list[Path]:
    """Folders of the harness with a file that defines one of the tasks ``names``."""
    defines = re.compile(rf"^task: *[\"']?({'|'.join(map(re.escape, names))})[\"']? *$", re.MULTILINE)
    root = Path(lm_eval.tasks.__file__).parent
    found = (path.parent for path in root.rglob("*.yaml") if defines.search(path.read_text("utf-8")))
    return sorted(set(found))
