"""The data directory: two token stores, their tokenizer, and ``dataset.json``, which says what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_json
from tokenformer.language.rules import DocumentRules
from tokenformer.language.token_stream import TokenStream
from tokenformer.language.tokenizers import Tokenizer, load_tokenizer
from tokenformer.models.config import DecoderConfig
from tokenformer.validation import StrictModel, validate

DATASET_FILE = "dataset.json"
Count = Annotated[int, Field(ge=0)]
SplitName = Annotated[str, Field(pattern="^[a-z]+$")]  # also a file name
SPLIT_NAMES = ("train", "validation")
"""The splits that every data directory has; where ``test_sources`` were given there is also ``test``."""


class SplitInfo(StrictModel):
    """Counts of one split: ``tokens`` include an end-of-document id each, ``utf8_bytes`` are of text; ``shards``
    is the number of stores that hold it (:func:`~tokenformer.language.store.shard_prefixes`)."""

    documents: Count
    tokens: Count
    utf8_bytes: Count
    shards: Annotated[int, Field(ge=1, lt=10**5)] = 1


class SplitRule(StrictModel):
    """How documents were divided.

    ``content_hash``: a document is held out if the SHA-256 of its text, as a fraction of its range, lies
    below ``validation_fraction``. ``tail``: the text is held out from UTF-8 byte ``cut`` of the corpus
    on, moved to a line boundary where there is one. ``separate``: the validation documents were given apart.
    """

    method: Literal["content_hash", "tail", "separate"]
    validation_fraction: float | None = None
    cut: Count | None = None


class DatasetInfo(StrictModel):
    """The content of ``dataset.json``. ``corpus_sha256`` is a hash of all texts taken, in their order.

    ``skipped`` counts by reason what was left out of the sources.
    """

    format_version: Literal[1] = 1
    sources: list[str]
    validation_sources: list[str]
    test_sources: list[str] = Field(default_factory=list)
    text_field: str
    rules: DocumentRules = DocumentRules()
    split_rule: SplitRule
    splits: dict[SplitName, SplitInfo]
    skipped: dict[str, Count]
    corpus_sha256: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    padded_vocab_size: int
    dtype: str


class DataDirectory:
    """A validated, memory-mapped data directory: ``path``, ``info``, ``tokenizer``, a token stream a split."""

    def __init__(
        self, path: Path, info: DatasetInfo, tokenizer: Tokenizer, streams: dict[str, TokenStream]
    ) -> None:
        self.path = path
        self.info = info
        self.tokenizer = tokenizer
        self._streams = streams

    @classmethod
    def open(cls, path: Path | str) -> DataDirectory:
        """Open what ``prepare`` wrote.

        Raises:
            TokenFormerError: a file is missing, truncated or corrupt, the tokenizer is not the one the data
                was made with, or counts differ from ``dataset.json``.
        """
        path = Path(path)
        if not path.is_dir():
            raise TokenFormerError(
                f"{path}: no such directory; expected a data directory, made by 'tokenformer prepare'"
            )
        values = read_json(path / DATASET_FILE, "the description of a data directory")
        info = validate(DatasetInfo, values, source=str(path / DATASET_FILE))
        tokenizer = load_tokenizer(path)
        if tokenizer.sha256 != info.tokenizer_sha256:
            raise TokenFormerError(
                f"{path / 'tokenizer.json'}: has hash {tokenizer.sha256[:16]}, expected "
                f"{info.tokenizer_sha256[:16]} ({DATASET_FILE}): not the tokenizer that made these tokens"
            )
        streams = {name: _open_split(path, name, info) for name in info.splits}
        return cls(path, info, tokenizer, streams)

    @property
    def identity(self) -> dict[str, str | int]:
        """What the samples follow from, by the names of ``dataset.json``: the same words, tokens and documents."""
        train = self.info.splits["train"]
        return {
            "corpus_sha256": self.info.corpus_sha256,
            "tokenizer_sha256": self.info.tokenizer_sha256,
            "splits.train.documents": train.documents,
            "splits.train.tokens": train.tokens,
        }

    def check_model(self, config: DecoderConfig, tokenizer_sha256: str | None) -> None:
        """Refuse a model that cannot read these tokens; ``tokenizer_sha256`` of its tokenizer, where known.

        Raises:
            TokenFormerError: the model has another tokenizer or too small a vocabulary; or, of a model
                without tokenizer, a vocabulary of another size.
        """
        info = self.info
        if tokenizer_sha256 is not None and tokenizer_sha256 != info.tokenizer_sha256:
            raise TokenFormerError(
                f"{self.path}: its tokenizer ({info.tokenizer}, hash {info.tokenizer_sha256[:16]}) is not the "
                f"model's (hash {tokenizer_sha256[:16]}); prepare the data with the model's tokenizer.json"
            )
        fits = config.vocab_size >= info.vocab_size if tokenizer_sha256 else False
        if not fits and config.vocab_size != info.padded_vocab_size:
            raise TokenFormerError(
                f"vocab_size: the model has {config.vocab_size}, expected {info.padded_vocab_size} for the "
                f"tokenizer of {self.path} ({info.tokenizer}: {info.vocab_size} ids, padded to a multiple of 128)"
            )

    def split(self, name: str) -> TokenStream:
        """The tokens of a split.

        Raises:
            TokenFormerError: there is no such split.
        """
        if name not in self._streams:
            raise TokenFormerError(f"{self.path}: no split '{name}'; found {', '.join(self._streams)}")
        return self._streams[name]


def _open_split(path: Path, name: str, info: DatasetInfo) -> TokenStream:
    expected = info.splits[name]
    stream = TokenStream(path, name, expected.shards)
    found = (stream.num_documents, stream.num_tokens)
    if found != (expected.documents, expected.tokens):
        where = (
            f"{stream.prefix}.idx"
            if expected.shards == 1
            else f"{stream.prefix}: its {expected.shards} shards"
        )
        raise TokenFormerError(
            f"{where}: {'holds' if expected.shards == 1 else 'hold'} {found[0]} documents and {found[1]} tokens, "
            f"expected {expected.documents} and {expected.tokens} ({DATASET_FILE})"
        )
    return stream
