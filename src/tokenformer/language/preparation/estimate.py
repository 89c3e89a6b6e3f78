"""How much text there will be, from the sizes of the files and what has been read of them."""

from __future__ import annotations

import io
import os
from itertools import accumulate
from pathlib import Path

from tokenformer.errors import TokenFormerError
from tokenformer.language.preparation.corpus import Corpus, Position
from tokenformer.language.preparation.work import SourceFiles
from tokenformer.language.sources.compression import explain_damage, open_bytes

_PROBE = 1 << 22


class SizeEstimate:
    """An estimate that gets better from file to file; of sources without files there is none."""

    def __init__(self, corpus: Corpus, files: SourceFiles) -> None:
        sizes: list[int] = []
        self._first_unit: list[int] = []
        for group in range(len(corpus.groups)):
            self._first_unit.append(len(sizes))
            sizes += [sum(files[str(path)][0] for path in unit.files()) for unit in corpus.units(group)]
        self._first_unit.append(len(sizes))
        self._before = [0, *accumulate(sizes)]
        largest = max(files, key=lambda name: files[name][0], default=None)
        self._text_per_byte = 1.0 if largest is None else _expansion(Path(largest))
        self._unit, self._text_before_unit = 0, 0

    def total(self, position: Position, utf8_bytes: int) -> float | None:
        """UTF-8 bytes of text to expect, when ``utf8_bytes`` were found up to ``position``."""
        if not self._before[-1]:
            return None
        unit = self._first_unit[position.group] + position.unit
        if unit != self._unit:
            self._unit, self._text_before_unit = unit, utf8_bytes
            if self._before[unit]:
                self._text_per_byte = utf8_bytes / self._before[unit]
        left = self._before[-1] - self._before[unit]
        return max(utf8_bytes, self._text_before_unit + left * self._text_per_byte)


def _expansion(path: Path) -> float:
    """Bytes that one byte of the file unpacks to, by its beginning."""
    try:
        with explain_damage(path), open_bytes(path) as file:
            found = len(file.read(_PROBE))
            return found / max(1, os.lseek(file.fileno(), 0, os.SEEK_CUR))
    except (TokenFormerError, io.UnsupportedOperation):
        return 1.0  # whatever is wrong with the file is found, and said, when it is read
