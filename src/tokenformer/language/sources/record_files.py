"""Files of records, TFRecord and ArrayRecord: one document in each record."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tokenformer.errors import TokenFormerError
from tokenformer.language.sources.compression import explain_damage, open_bytes
from tokenformer.language.sources.records import (
    BrokenDocument,
    Document,
    Faults,
    import_extra,
    text_of_record,
)
from tokenformer.language.sources.text_files import decode
from tokenformer.language.sources.tf_example import parse_example

_SHARD = re.compile(r"-\d+-of-\d+$")

_LENGTH = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_LARGEST_RECORD = 2**31 - 1  # of a protobuf message
_MASK_DELTA = 0xA282EAD8

_ARRAY_RECORD_OPTIONS = "readahead_buffer_size:4M,max_parallelism:1"


def without_shard(name: str) -> str:
    """A file's name without the number of its shard: ``c4-train.tfrecord-00000-of-01024``."""
    return _SHARD.sub("", name)


def read_tfrecord(path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    """The records of a TFRecord file; both checksums of each are verified.

    Raises:
        TokenFormerError: a record that is cut off or fails its checksum, with its number and offset.
    """
    with explain_damage(path), open_bytes(path) as file:
        for number, record in enumerate(_tfrecords(file, path), start=1):
            place = f"{path}: record {number}"
            with faults:
                yield Document(_text(record, place, text_field), place)


def read_array_record(path: Path, text_field: str, faults: Faults) -> Iterator[Document]:
    """The records of an ArrayRecord file, in order.

    Raises:
        TokenFormerError: a file that is cut off or fails its checksums, with the number of the record.
    """
    module = import_extra("array_record.python.array_record_module", str(path))
    with explain_damage(path), path.open("rb"):
        pass  # the library has one message for a file that is missing and one that is damaged
    with _open_array_record(module.ArrayRecordReader, path) as reader:
        for number in range(1, reader.num_records() + 1):
            place = f"{path}: record {number}"
            with _explain(f"{place}: damaged"):
                record = reader.read()
            with faults:
                yield Document(_text(record, place, text_field), place)


def masked_crc32c(content: bytes, source: str) -> int:
    """The checksum of TFRecord: CRC-32C, rotated right by 15 bits, plus a constant."""
    value: int = import_extra("google_crc32c", source).value(content)
    return ((value >> 15 | value << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _tfrecords(file: IO[bytes], path: Path) -> Iterator[bytes]:
    offset, number = 0, 1
    while head := file.read(_LENGTH.size):
        place = f"{path}: record {number} at offset {offset}"
        if len(head) < _LENGTH.size:
            raise TokenFormerError(f"{place}: cut off: found {len(head)} bytes, expected {_LENGTH.size}")
        length, checksum = _LENGTH.unpack(head)
        if masked_crc32c(head[:8], str(path)) != checksum:
            raise TokenFormerError(f"{place}: damaged or not a TFRecord file: the length fails its checksum")
        if length > _LARGEST_RECORD:
            raise TokenFormerError(f"{place}: a record of {length} bytes, expected at most {_LARGEST_RECORD}")
        body = file.read(length + _CHECKSUM.size)
        if len(body) < length + _CHECKSUM.size:
            raise TokenFormerError(
                f"{place}: cut off: found {len(body)} bytes, expected {length + _CHECKSUM.size}"
            )
        record = body[:length]
        if masked_crc32c(record, str(path)) != _CHECKSUM.unpack(body[length:])[0]:
            raise TokenFormerError(f"{place}: damaged: the content fails its checksum")
        yield record
        offset, number = offset + _LENGTH.size + len(body), number + 1


@contextmanager
def _open_array_record(reader_class: Any, path: Path) -> Iterator[Any]:
    reader = reader_class(str(path), _ARRAY_RECORD_OPTIONS)
    if not reader.ok():
        with _explain(f"{path}: damaged or not a {path.suffix} file"):
            reader.close()  # raises with the reason
    try:
        yield reader
    finally:
        with suppress(RuntimeError):  # of damage that was met while reading, and told there
            reader.close()


@contextmanager
def _explain(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, IndexError, ValueError) as error:
        raise TokenFormerError(f"{what} ({' '.join(str(error).split())})") from error


def _text(record: bytes, place: str, text_field: str) -> str:
    """The text in a record: a feature of a ``tf.train.Example``, a field of a JSON object, or UTF-8 as it is."""
    features = parse_example(record)
    if features is not None:
        return _text_feature(features, place, text_field)
    text = decode(record, f"{place} (no tf.train.Example)")
    if not text.lstrip().startswith("{"):
        return text
    try:
        return text_of_record(json.loads(text), place, text_field)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BrokenDocument(f"{place}: invalid JSON ({error})", "invalid JSON") from error


def _text_feature(features: dict[str, Any], place: str, text_field: str) -> str:
    if text_field not in features:
        found = ", ".join(sorted(features))
        raise BrokenDocument(f"{place}: no feature '{text_field}'; found {found}", "without the text field")
    values = features[text_field]
    if len(values) != 1 or not isinstance(values[0], bytes):
        kind = f"{len(values)} values" if len(values) != 1 else f"one {type(values[0]).__name__}"
        raise BrokenDocument(
            f"{place}: feature '{text_field}' holds {kind}, expected one byte string", "not a string"
        )
    return decode(values[0], f"{place}: feature '{text_field}'")
