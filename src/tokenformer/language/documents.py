"""Sources to documents: files, packed or not, folders, globs, datasets of the hub, the default corpus."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DATASET_FILE
from tokenformer.language.presets import PRESET_PREFIX, PresetSource
from tokenformer.language.sources.arrow_files import (
    is_saved_dataset,
    read_arrow,
    read_parquet,
    read_saved_dataset,
)
from tokenformer.language.sources.compression import explain_damage, plain_name
from tokenformer.language.sources.hub import HUB_PREFIX, check_hub_source, read_dataset, read_hub
from tokenformer.language.sources.json_files import read_json_file, read_json_lines
from tokenformer.language.sources.published_texts import articles, cut_texts, read_lines, read_range
from tokenformer.language.sources.record_files import read_array_record, read_tfrecord, without_shard
from tokenformer.language.sources.records import Document, Faults, OnError, import_extra
from tokenformer.language.sources.text_files import decode, is_binary, read_text_file
from tokenformer.language.sources.token_files import (
    DATA_SUFFIX,
    INDEX_SUFFIX,
    read_token_store,
    store_files,
    token_index,
)
from tokenformer.language.standard_library import standard_library_files

DEFAULT_CORPUS = "default"
"""The name of the embedded corpus: the Python source files of the running interpreter's standard library."""

_RECORD_READERS = {
    ".jsonl": read_json_lines,
    ".json": read_json_file,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".tfrecord": read_tfrecord,
    ".tfrecords": read_tfrecord,
    ".arrayrecord": read_array_record,
    ".array_record": read_array_record,
    INDEX_SUFFIX: read_token_store,
}
_PACKED_INSIDE = {".parquet", ".arrow", ".arrayrecord", ".array_record"}
_BINARY = {*_PACKED_INSIDE, ".tfrecord", ".tfrecords", INDEX_SUFFIX}


def check_sources(sources: Sequence[str | Path]) -> None:
    """Refuse sources that cannot be read, before any reading starts.

    Raises:
        TokenFormerError: no source at all; one that is no file, folder, glob with a match, dataset of the hub,
            preset or ``default``; or one of the hub without the library for it.
    """
    if not sources:
        raise TokenFormerError(
            "sources: none given; expected files, folders, globs, hf:NAME, preset:NAME or 'default'; see prepare --help"
        )
    for source in map(str, sources):
        if source.startswith(HUB_PREFIX):
            check_hub_source(source)
        elif source.startswith(PRESET_PREFIX):
            if not list_units(source)[0].files():
                import_extra("datasets", source)
        elif source != DEFAULT_CORPUS:
            expand(source)


def expand(source: str | Path) -> list[Path]:
    """The file or folder of that name, or what a glob matches in sorted order, without hidden files.

    Of a folder and something in it, both matched, the folder alone is taken.

    Raises:
        TokenFormerError: there is none.
    """
    if store := token_index(Path(source)):
        return [store]
    if Path(source).exists():
        return [Path(source)]
    if not glob.has_magic(str(source)):
        raise TokenFormerError(
            f"{source}: no such file or folder; expected a text file, .jsonl, .json, .parquet, .arrow, "
            ".tfrecord or .array_record (text, JSON and TFRecord also as .gz, .xz, .bz2, .zst or .zip), .idx of "
            f"Megatron, a folder, a saved dataset, a glob, hf:NAME, preset:NAME or '{DEFAULT_CORPUS}'"
        )
    found = {Path(name) for name in glob.glob(str(source), recursive=True)}  # noqa: PTH207 (may be absolute)
    if not found:
        raise TokenFormerError(f"{source}: no file or folder matches this glob")
    return sorted(path for path in found if not found.intersection(path.parents) and not _is_store_data(path))


def read_documents(
    source: str | Path,
    *,
    text_field: str = "text",
    on_error: OnError = "stop",
    skipped: Counter[str] | None = None,
) -> Iterator[Document]:
    """Stream the documents of one source, in a fixed order.

    A text file is one document. ``.jsonl`` holds one in ``text_field`` of each line, ``.json`` in each item of
    its list, ``.parquet``, ``.arrow`` and folders of ``datasets.save_to_disk`` in each row, ``.tfrecord`` and
    ``.array_record`` in each record; ``.idx`` (or ``.bin``, or their name without it) of Megatron in each document,
    as ids. Text, JSON and TFRecord are unpacked by the suffix (``.gz``, ``.xz``,
    ``.bz2``, ``.zst``, ``.zip`` of one file). A folder is read recursively in sorted
    order, without hidden files; a glob as the sorted files and folders it matches; ``hf:NAME[:config][:split]``
    streams a dataset of the Hugging Face hub; ``preset:NAME[:SPLIT][=PATH]`` one of
    :data:`~tokenformer.language.presets.PRESETS`, its training documents unless a split is named.

    With ``on_error="skip"`` broken documents are left out: text that is not UTF-8, JSON that is invalid or has no
    string in ``text_field``. ``skipped`` counts them by reason, and what is always left out: ``binary`` files of a
    folder (a NUL byte near the start) and ``not UTF-8`` files of the default corpus.

    Raises:
        TokenFormerError: a broken document, with file and line; always a source that is missing, a file that is
            damaged, a table without the column, or a package that is not installed.
    """
    faults = Faults(on_error, Counter() if skipped is None else skipped)
    for unit in list_units(source):
        yield from read_unit(unit, text_field, faults)


class Unit(NamedTuple):
    """What of a source is read by itself: the path of a file or saved dataset; or the name of a dataset of the hub
    or of the default corpus. ``preset`` names the split of a preset that it belongs to, ``NAME:SPLIT``."""

    place: Path | str
    in_folder: bool = False  # found by going through a folder, where binary files are passed over
    preset: str = ""

    @property
    def is_store(self) -> bool:
        """Whether its documents are tokenized already."""
        return isinstance(self.place, Path) and self.place.suffix == INDEX_SUFFIX

    def files(self) -> list[Path]:
        """The files that it is read from, sorted; none of a dataset of the hub."""
        if isinstance(self.place, str):
            if self.preset:
                return PresetSource.parse(self.place).local_files()
            return [path for path, _ in standard_library_files()] if self.place == DEFAULT_CORPUS else []
        path = self.place
        if self.is_store:
            return store_files(path)
        return sorted(inner for inner in path.rglob("*") if inner.is_file()) if path.is_dir() else [path]


def list_units(source: str | Path) -> list[Unit]:
    """The parts of a source, which read one after another give the documents of :func:`read_documents`.

    Raises:
        TokenFormerError: a source that is missing.
    """
    if str(source) == DEFAULT_CORPUS or str(source).startswith(HUB_PREFIX):
        return [Unit(str(source))]
    if str(source).startswith(PRESET_PREFIX):
        return _preset_units(PresetSource.parse(str(source)))
    found = []
    for path in expand(source):
        if (path / DATASET_FILE).is_file() and token_index(path / "train"):
            raise TokenFormerError(
                f"{path}: a data directory; name the tokens of one split, {path / 'train.idx'}"
            )
        if path.is_dir() and not is_saved_dataset(path):
            found += [Unit(inner, in_folder=True) for inner in _folder_content(path)]
        else:
            found.append(Unit(path))
    return found


def read_unit(unit: Unit, text_field: str, faults: Faults) -> Iterator[Document]:
    """Stream the documents of one part of a source, in a fixed order; errors as in :func:`read_documents`."""
    place = unit.place
    if unit.preset:
        yield from _read_preset(unit, faults)
    elif place == DEFAULT_CORPUS:
        yield from _read_standard_library(Faults("skip", faults.skipped))
    elif isinstance(place, str):
        yield from read_hub(place, text_field, faults)
    elif unit.in_folder and _is_binary_text(place):
        faults.skipped["binary"] += 1
    else:
        yield from _read_path(place, text_field, faults)


def _preset_units(wanted: PresetSource) -> list[Unit]:
    wanted = wanted.with_split("train")
    name = f"{wanted.preset.name}:{wanted.split}"
    files = wanted.local_files()
    if not files or wanted.preset.documents == "articles":  # which may run on from one file to the next
        return [Unit(str(wanted), preset=name)]
    return [Unit(path, preset=name) for path in files]


def _read_preset(unit: Unit, faults: Faults) -> Iterator[Document]:
    preset, split, _ = PresetSource.parse(f"{PRESET_PREFIX}{unit.preset}")
    field, files = preset.text_field, unit.files()
    if not files:
        records = read_dataset(preset.hub[split], str(unit.place), field, faults)
    elif preset.documents == "ranges":
        yield from read_range(files[0], *preset.ranges[split], preset.size, faults)
        return
    elif preset.documents == "articles":
        records = chain.from_iterable(
            _read_path(path, field, faults) if _kind(path) in _RECORD_READERS else read_lines(path, faults)
            for path in files
        )
    else:
        records = chain.from_iterable(_read_path(path, field, faults) for path in files)
    if preset.documents == "articles":
        yield from articles(records)
    elif preset.whole_on_hub:
        yield from cut_texts(records, *preset.ranges[split], preset.size, faults)
    else:
        yield from records


def _read_standard_library(faults: Faults) -> Iterator[Document]:
    for path, name in standard_library_files():
        with explain_damage(path):
            content = path.read_bytes()
        with faults:
            yield Document(decode(content, name), name)


def _is_binary_text(path: Path) -> bool:
    """A file that would be read as text and is none."""
    return path.is_file() and _kind(path) not in _BINARY and is_binary(path)


def _read_path(path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    if is_saved_dataset(path):
        yield from read_saved_dataset(path, text_field, faults)
    else:
        yield from _read_file(path, text_field, faults)


def _folder_content(folder: Path) -> list[Path]:
    """All files below ``folder``; a saved dataset stands for its files."""
    found = []
    for directory, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        datasets = {name for name in subfolders if is_saved_dataset(Path(directory, name))}
        subfolders[:] = [name for name in subfolders if name not in datasets]
        found += [Path(directory, name) for name in datasets]
        files = (Path(directory, name) for name in names if not name.startswith("."))
        found += [path for path in files if path.is_file() and not _is_store_data(path)]
    return sorted(found)


def _is_store_data(path: Path) -> bool:
    """The half of a store that its index stands for."""
    return path.suffix == DATA_SUFFIX and token_index(path) is not None


def _read_file(path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    kind = _kind(path)
    if kind in _PACKED_INSIDE and plain_name(path) != path.name:
        raise TokenFormerError(
            f"{path}: a packed {kind} file, which is packed inside already; unpack it first"
        )
    reader = _RECORD_READERS.get(kind)
    if reader is None:
        yield from read_text_file(path, faults)
    else:
        yield from reader(path, text_field, faults)


def _kind(path: Path) -> str:
    """The suffix below that of a compression, without the number of a shard."""
    return Path(without_shard(plain_name(path))).suffix
