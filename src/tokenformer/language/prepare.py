"""Documents to a data directory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from tokenformer.errors import TokenFormerError
from tokenformer.files import new_directory, require_free, write_json
from tokenformer.language.data_directory import (
    DATASET_FILE,
    SPLIT_NAMES,
    DataDirectory,
    DatasetInfo,
    SplitInfo,
    SplitRule,
)
from tokenformer.language.presets import expand_presets
from tokenformer.language.rules import DocumentRules
from tokenformer.language.splits import Corpus, Part, choose_rule
from tokenformer.language.store import TokenStoreWriter, token_dtype
from tokenformer.language.tokenizers import (
    SMALLEST_BPE,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from tokenformer.progress import progress_bar

DEFAULT_VALIDATION_FRACTION = 0.05

_BATCH_CHARACTERS = 4_000_000


def prepare(
    sources: Sequence[str | Path],
    out: Path | str,
    *,
    tokenizer: str | Path = "byte",
    validation: Sequence[str | Path] = (),
    test: Sequence[str | Path] = (),
    validation_fraction: float | None = None,
    text_field: str = "text",
    rules: DocumentRules | None = None,
    eos_token: str | None = None,
) -> DataDirectory:
    """Write the data directory ``out``; the same input gives the same bytes.

    ``sources``, ``validation`` and ``test`` are what :func:`~tokenformer.language.documents.read_documents` takes.
    Without ``validation``, ``validation_fraction`` (0.05) of the documents is held out by a hash of their
    text, or, where that would leave a side empty, the end of the text. ``test`` documents make a split of their
    own. ``tokenizer`` is ``byte``, ``bpe:N``
    (trained on the training documents, N ids in all) or a file or directory with a ``tokenizer.json``;
    ``eos_token`` names the end-of-document token of such a file. Without ``rules`` every document that is not
    empty is taken.

    Raises:
        TokenFormerError: wrong options, unreadable sources, an empty corpus, one too small to be divided, or
            an ``out`` that already holds something. Nothing is left behind.
    """
    out = require_free(out)
    sources, validation, test = expand_presets(sources, validation, test)
    fraction = _check_fraction(validation_fraction, bool(validation))
    bpe_size = _bpe_size(str(tokenizer))
    given = None if bpe_size else _given_tokenizer(tokenizer, eos_token)
    rules = rules or DocumentRules()
    separate = {"validation": validation, "test": test}
    corpus = Corpus(sources, separate, text_field, rules)
    names = SPLIT_NAMES + (("test",) if test else ())

    with progress_bar("reading", None, "MB") as bar:
        survey = corpus.survey(fraction, lambda text: bar.advance(len(text) / 1e6))
    rule = SplitRule(method="separate") if validation else choose_rule(survey, fraction)
    made = given or train_bpe((part.text for part in corpus.parts(rule) if part.split == "train"), bpe_size)

    with new_directory(out) as scratch:
        splits = _write_splits(corpus.parts(rule), names, made, scratch, survey.utf8_bytes)
        made.save(scratch)
        info = DatasetInfo(
            sources=[str(source) for source in sources],
            validation_sources=[str(source) for source in validation],
            test_sources=[str(source) for source in test],
            text_field=text_field,
            rules=rules,
            split_rule=rule,
            splits=splits,
            skipped=dict(sorted(corpus.skipped.items())),
            corpus_sha256=survey.sha256,
            tokenizer=str(tokenizer),
            tokenizer_sha256=made.sha256,
            vocab_size=made.vocab_size,
            padded_vocab_size=made.padded_vocab_size,
            dtype=str(token_dtype(made.padded_vocab_size)),
        )
        write_json(scratch / DATASET_FILE, info.model_dump(mode="json"))
    return DataDirectory.open(out)


def _check_fraction(fraction: float | None, separate: bool) -> float:
    if separate and fraction is not None:
        raise TokenFormerError(
            "validation_fraction: has no meaning beside separate validation documents; give one"
        )
    if fraction is not None and not 0 < fraction < 1:
        raise TokenFormerError(f"validation_fraction: found {fraction}, expected a number between 0 and 1")
    return DEFAULT_VALIDATION_FRACTION if fraction is None else fraction


def _bpe_size(tokenizer: str) -> int:
    """N of ``bpe:N``, or 0 for anything else."""
    kind, colon, size = tokenizer.partition(":")
    if kind != "bpe":
        return 0
    if not colon or not size.isascii() or not size.isdigit() or int(size) < SMALLEST_BPE:
        raise TokenFormerError(
            f"tokenizer: found '{tokenizer}', expected bpe:N with N at least {SMALLEST_BPE}, e.g. bpe:8192"
        )
    return int(size)


def _given_tokenizer(tokenizer: str | Path, eos_token: str | None) -> Tokenizer:
    if str(tokenizer) == "byte":
        return ByteTokenizer()
    if not Path(tokenizer).exists():
        raise TokenFormerError(
            f"tokenizer: found '{tokenizer}', expected byte, bpe:N or the path of a tokenizer.json"
        )
    return load_tokenizer(tokenizer, eos_token=eos_token)


def _write_splits(
    parts: Iterable[Part], names: Sequence[str], tokenizer: Tokenizer, directory: Path, utf8_bytes: int
) -> dict[str, SplitInfo]:
    dtype = token_dtype(tokenizer.padded_vocab_size)
    end = np.array([tokenizer.eos_token_id], dtype=dtype)
    written: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = {split: stack.enter_context(TokenStoreWriter(directory / split, dtype)) for split in names}
        bar = stack.enter_context(progress_bar("tokenizing", utf8_bytes / 1e6, "MB"))
        for split, texts in _batches(parts):
            for ids in tokenizer.encode_batch(texts):
                writers[split].add_document(np.concatenate((ids.astype(dtype), end)))
            size = sum(len(text.encode("utf-8")) for text in texts)
            written[split] += size
            bar.advance(size / 1e6)
            bar.note(f"{sum(writer.num_documents for writer in writers.values())} documents")
    _check_written(written, names, utf8_bytes)
    return {
        split: SplitInfo(documents=writer.num_documents, tokens=writer.num_tokens, utf8_bytes=written[split])
        for split, writer in writers.items()
    }


def _batches(parts: Iterable[Part]) -> Iterator[tuple[str, list[str]]]:
    """Texts of one split at a time, a few megabytes together; each split keeps its order."""
    waiting: defaultdict[str, list[str]] = defaultdict(list)
    sizes: Counter[str] = Counter()
    for split, text in parts:
        waiting[split].append(text)
        sizes[split] += len(text)
        if sizes[split] >= _BATCH_CHARACTERS:
            yield split, waiting[split]
            waiting[split] = []
            sizes[split] = 0
    yield from ((split, texts) for split, texts in waiting.items() if texts)


def _check_written(written: Counter[str], names: Sequence[str], utf8_bytes: int) -> None:
    if sum(written.values()) != utf8_bytes:
        raise TokenFormerError(
            f"sources: changed while they were read: found {utf8_bytes} bytes of text, "
            f"then {sum(written.values())}"
        )
    empty = [split for split in names if not written[split]]
    if empty:
        raise TokenFormerError(
            f"sources: {utf8_bytes} bytes of text are too few to divide: nothing is left for "
            f"{' and '.join(empty)}; give more text or separate validation documents"
        )
