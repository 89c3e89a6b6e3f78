"""Datasets of the Hugging Face hub, streamed by the library ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tokenformer.errors import TokenFormerError
from tokenformer.language.sources.records import Document, Faults, import_extra, text_of_record

HUB_PREFIX = "hf:"
_DEFAULT_SPLIT = "train"


class HubSource(NamedTuple):
    """``hf:NAME[:config][:split]``; an empty ``config`` is the dataset's default.

    ``revision`` is a branch other than the main one, ``data_files`` a glob that chooses among its files.
    """

    name: str
    config: str
    split: str
    revision: str = ""
    data_files: str = ""

    @classmethod
    def parse(cls, source: str) -> HubSource:
        """Take a source apart.

        Raises:
            TokenFormerError: it has another form.
        """
        name, *rest = source.removeprefix(HUB_PREFIX).split(":")
        if not name or len(rest) > 2:
            raise TokenFormerError(
                f"{source}: expected hf:NAME[:config][:split], e.g. hf:roneneldan/TinyStories, "
                "hf:allenai/c4:en or hf:roneneldan/TinyStories::validation"
            )
        config, split = [*rest, "", ""][:2]
        return cls(name, config, split or _DEFAULT_SPLIT)


def check_hub_source(source: str) -> None:
    """Refuse a source of another form, or one that cannot be read for want of the library."""
    HubSource.parse(source)
    import_extra("datasets", source)


def read_hub(source: str, text_field: str, faults: Faults) -> Iterator[Document]:
    """The rows of one split in the hub's order; nothing is kept on disk, so each pass reads them again.

    Raises:
        TokenFormerError: the dataset, configuration, split or column does not exist, or the hub cannot be
            reached.
    """
    yield from read_dataset(HubSource.parse(source), source, text_field, faults)


def read_dataset(wanted: HubSource, source: str, text_field: str, faults: Faults) -> Iterator[Document]:
    """As :func:`read_hub`; ``source`` names the dataset in errors and documents."""
    rows = _rows(_load(source, wanted, text_field), source, wanted)
    for number, record in enumerate(rows, start=1):
        place = f"{source}: row {number}"
        with faults:
            yield Document(text_of_record(record, place, text_field), place)


def _load(source: str, wanted: HubSource, text_field: str) -> Any:
    library = import_extra("datasets", source)
    try:
        dataset = library.load_dataset(
            wanted.name,
            wanted.config or None,
            split=wanted.split,
            revision=wanted.revision or None,
            data_files=wanted.data_files or None,
            streaming=True,
        )
        columns = dataset.column_names
    except Exception as error:  # the library passes on whatever its readers and its client raise
        raise _unreadable(source, wanted, error) from error
    if columns is None:  # not known before the first row
        return dataset
    if text_field not in columns:
        raise TokenFormerError(f"{source}: no column '{text_field}'; found {', '.join(columns) or 'none'}")
    return dataset.select_columns([text_field])


def _rows(dataset: Any, source: str, wanted: HubSource) -> Iterator[Any]:
    rows = iter(dataset)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as in _load
            raise _unreadable(source, wanted, error) from error
        yield row


def _unreadable(source: str, wanted: HubSource, error: Exception) -> TokenFormerError:
    reason = " ".join(str(error).split()) or "no reason given"
    return TokenFormerError(
        f"{source}: cannot be read by the datasets library ({type(error).__name__}: {reason}); check the name "
        "and the access to the Hugging Face hub, or fetch the files where there is access, with "
        f"'hf download --repo-type dataset {wanted.name} --local-dir DIR', and give those as sources "
        "(e.g. 'DIR/**/*.parquet')"
    )
