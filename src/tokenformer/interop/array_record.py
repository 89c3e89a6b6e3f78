"""Data directories to ArrayRecord files, which the authors' JAX edition (MaxText) reads through grain.

Its pipeline takes the text from the feature ``text`` of each record, a serialized ``tf.train.Example``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from tokenformer.errors import TokenFormerError
from tokenformer.files import new_directory
from tokenformer.interop.formats import ConvertedData
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.sources.tf_example import encode_example
from tokenformer.language.store import TokenStore
from tokenformer.language.tokenizers import Tokenizer
from tokenformer.progress import ProgressBar, progress_bar

TEXT_FEATURE = "text"

_OPTIONS = "group_size:1"  # each record can be read by itself, which a global shuffle needs


def data_to_array_record(source: Path, target: Path) -> ConvertedData:
    """Write the text of every document, decoded, to ``<split>.array_record-00000-of-00001`` and so on.

    A file holds the documents of one store of the split, in their order. ``tokenizer.json`` comes along.

    Raises:
        TokenFormerError: ``source`` is no data directory, ``target`` holds something, or ``array_record`` is not
            installed. Nothing is left behind.
    """
    data = DataDirectory.open(source)
    writer = _writer_class()
    documents = sum(split.documents for split in data.info.splits.values())
    with new_directory(target) as scratch, progress_bar("converting", documents, "documents") as bar:
        for name in data.info.splits:
            shards = data.split(name).shards
            for number, store in enumerate(shards):
                file = scratch / f"{name}.array_record-{number:05d}-of-{len(shards):05d}"
                _write(writer(str(file), _OPTIONS), file, store, data.tokenizer, bar)
        data.tokenizer.save(scratch)
    return ConvertedData(Path(target), {name: split.documents for name, split in data.info.splits.items()})


def _write(writer: Any, file: Path, store: TokenStore, tokenizer: Tokenizer, bar: ProgressBar) -> None:
    try:
        for index in range(store.num_documents):
            text = tokenizer.decode(store.document(index).tolist())
            writer.write(encode_example({TEXT_FEATURE: text.encode("utf-8")}))
            bar.advance()
        writer.close()
    except RuntimeError as error:  # what the library raises for a full disk
        raise TokenFormerError(f"{file}: could not be written ({' '.join(str(error).split())})") from error


def _writer_class() -> Any:
    try:
        return import_module("array_record.python.array_record_module").ArrayRecordWriter
    except ImportError as error:
        raise TokenFormerError(
            "convert: arrayrecord needs array_record, which is not installed; pip install array_record"
        ) from error
