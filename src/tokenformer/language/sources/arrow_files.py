"""Tables with a column of texts: Parquet, Arrow files, and what ``datasets.save_to_disk`` writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_json
from tokenformer.language.sources.compression import explain_damage
from tokenformer.language.sources.records import BrokenDocument, Document, Faults, checked_text, import_extra

_ROWS = 512
_BUFFER = 1 << 20
_STATE_FILE, _SPLITS_FILE = "state.json", "dataset_dict.json"
_ARROW_MAGIC = b"ARROW1"


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``folder`` was written by ``save_to_disk`` of a dataset or of a dictionary of its splits."""
    return (folder / _SPLITS_FILE).is_file() or (
        (folder / _STATE_FILE).is_file() and (folder / "dataset_info.json").is_file()
    )


def read_parquet(path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    """One document a row, from the column ``text_field`` alone, a few hundred rows at a time."""
    parquet = import_extra("pyarrow.parquet", str(path))
    with _explain(path), parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
        _check_column(file.schema_arrow, path, text_field)
        batches = file.iter_batches(batch_size=_ROWS, columns=[text_field])
        yield from _rows(batches, path, text_field, faults)


def read_arrow(path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    """One document a row of an Arrow stream or file, a record batch at a time."""
    arrow = import_extra("pyarrow", str(path))
    with explain_damage(path), path.open("rb") as file:
        is_file = file.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
    with _explain(path), arrow.OSFile(str(path), "rb") as source:
        reader = arrow.ipc.open_file(source) if is_file else arrow.ipc.open_stream(source)
        _check_column(reader.schema, path, text_field)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield from _rows(batches, path, text_field, faults)


def read_saved_dataset(folder: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    """The rows of a dataset's Arrow files in the order that its ``state.json`` gives.

    Raises:
        TokenFormerError: several splits, of which one is to be named; a damaged description; as ``read_arrow``.
    """
    if (folder / _SPLITS_FILE).is_file():
        yield from read_saved_dataset(_only_split(folder), text_field, faults)
        return
    for path in _data_files(folder):
        yield from read_arrow(path, text_field, faults)


def _only_split(folder: Path) -> Path:
    path = folder / _SPLITS_FILE
    splits = read_json(path, "the splits of a saved dataset").get("splits")
    if not isinstance(splits, list) or not all(map(_is_file_name, splits)):
        raise TokenFormerError(f"{path}: found splits {splits!r}, expected a list of folder names")
    if len(splits) != 1:
        raise TokenFormerError(
            f"{folder}: a dataset with the splits {', '.join(splits) or 'none'}; name one of them, "
            f"e.g. {folder / (splits[0] if splits else 'train')}"
        )
    return folder / str(splits[0])


def _data_files(folder: Path) -> list[Path]:
    path = folder / _STATE_FILE
    state = read_json(path, "the state of a saved dataset")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise TokenFormerError(f"{path}: rows chosen by indices; save it after dataset.flatten_indices()")
    entries = state.get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or ()]
    if not isinstance(entries, list) or not all(map(_is_file_name, names)):
        raise TokenFormerError(f"{path}: _data_files: found {entries!r}, expected a list of file names")
    return [folder / str(name) for name in names]


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def _check_column(schema: Any, path: Path, text_field: str) -> None:
    if text_field not in schema.names:
        found = ", ".join(schema.names) or "none"
        raise TokenFormerError(f"{path}: no column '{text_field}'; found {found}")
    if schema.names.count(text_field) > 1:
        raise TokenFormerError(f"{path}: several columns '{text_field}', expected one")
    kind = str(schema.field(text_field).type)
    if "string" not in kind or kind.startswith(("list", "struct", "map", "large_list")):
        raise TokenFormerError(f"{path}: column '{text_field}' is {kind}, expected string")


def _rows(batches: Any, path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    number = 0
    for batch in batches:
        for value in batch.column(text_field):
            number += 1
            place = f"{path}: row {number}"
            with faults:
                yield Document(checked_text(_decoded(value, place), place, text_field), place)


def _decoded(value: Any, place: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise BrokenDocument(
            f"{place}: not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start} of the "
            "text; expected UTF-8 text",
            "not UTF-8",
        ) from error


@contextmanager
def _explain(path: Path) -> Iterator[None]:
    arrow = import_extra("pyarrow", str(path))
    try:
        with explain_damage(path):
            yield
    except arrow.ArrowException as error:  # reading errors that are no OSError
        raise TokenFormerError(f"{path}: damaged or not a {path.suffix} file ({error})") from error
