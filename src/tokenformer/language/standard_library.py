"""The embedded default corpus: the Python source files of the running interpreter's standard library."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from tokenformer.errors import TokenFormerError

_NOT_STANDARD = {"site-packages", "dist-packages", "__pycache__"}


def standard_library_files(root: Path | str | None = None) -> list[tuple[Path, str]]:
    """Every ``.py`` file below ``root`` with its relative POSIX path, sorted by that path.

    ``root`` is by default the standard library of the running interpreter; installed packages are left out.

    Raises:
        TokenFormerError: there are no source files (a frozen or zipped interpreter).
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    found = []
    for directory, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STANDARD]
        for name in names:
            path = Path(directory, name)
            if path.suffix == ".py" and path.is_file():
                found.append((path, path.relative_to(root).as_posix()))
    if not found:
        raise TokenFormerError(
            f"{root}: no Python source files; "
            "the default corpus needs an interpreter with its standard library"
        )
    return sorted(found, key=lambda pair: pair[1])
