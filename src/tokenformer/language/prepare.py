"""Documents to a data directory: in parallel, and going on where an interrupted run stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenformer.errors import TokenFormerError
from tokenformer.files import put_in_place, require_free, write_json
from tokenformer.language.data_directory import (
    DATASET_FILE,
    SPLIT_NAMES,
    DataDirectory,
    DatasetInfo,
    SplitInfo,
)
from tokenformer.language.hub_tokenizers import fetch_tokenizer, is_hub_tokenizer
from tokenformer.language.preparation.corpus import Corpus, Group, Position, Reading
from tokenformer.language.preparation.engines import Engine, LocalEngine
from tokenformer.language.preparation.estimate import SizeEstimate
from tokenformer.language.preparation.sharding import name_shards
from tokenformer.language.preparation.splits import divide, survey
from tokenformer.language.preparation.tokenizing import Tokenizing
from tokenformer.language.preparation.work import (
    Plan,
    Progress,
    WorkDirectory,
    describe_files,
    work_directory,
    work_path,
)
from tokenformer.language.presets import expand_presets
from tokenformer.language.rules import DocumentRules
from tokenformer.language.sources.records import BrokenDocument
from tokenformer.language.store import token_dtype
from tokenformer.language.tokenizers import (
    SMALLEST_BPE,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from tokenformer.progress import ProgressBar, progress_bar

DEFAULT_VALIDATION_FRACTION = 0.05
DEFAULT_SHARD_TOKENS = 2**32

Say = Callable[[str], None]


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
    shard_tokens: int | None = None,
    engine: Engine | None = None,
    say: Say = lambda message: None,
) -> DataDirectory:
    """Write the data directory ``out``; the same input gives the same bytes, whatever the ``engine``.

    ``sources``, ``validation`` and ``test`` are what :func:`~tokenformer.language.documents.read_documents` takes.
    Without ``validation``, ``validation_fraction`` (0.05) of the documents is held out by a hash of their
    text, or, where that would leave a side empty, the end of the text. ``test`` documents make a split of their
    own. ``tokenizer`` is ``byte``, ``bpe:N`` (trained on the training documents, N ids in all), a file or
    directory with a ``tokenizer.json``, or ``hf:NAME`` or ``owner/name`` of the Hugging Face hub; ``eos_token``
    names its end-of-document token. Without ``rules`` every document that is not empty is taken. A split is one
    store, or shards of at most ``shard_tokens`` (2^32) tokens; a longer document has one to itself.

    Without ``engine`` all cores are used, in spawned processes: a script then needs the usual
    ``if __name__ == "__main__":``. (Bytes, and a few megabytes, are done in this process.) Work that is interrupted
    lies beside ``out``, in ``.NAME.preparing``; the same call goes on from there. ``say`` hears of that.

    Raises:
        TokenFormerError: wrong options, unreadable sources, an empty corpus, one too small to be divided,
            an ``out`` that already holds something or that another process is preparing.
    """
    out = Path(out)
    sources, validation, test = expand_presets(sources, validation, test)
    fraction = _check_fraction(validation_fraction, bool(validation))
    shard_tokens = DEFAULT_SHARD_TOKENS if shard_tokens is None else shard_tokens
    if shard_tokens < 1:
        raise TokenFormerError(f"shard_tokens: found {shard_tokens}, expected at least 1")
    bpe_size = _bpe_size(str(tokenizer))
    given = None if bpe_size else _given_tokenizer(tokenizer, eos_token)
    rules = rules or DocumentRules()
    separate = {"validation": validation, "test": test}
    groups = [Group(None, sources), *(Group(split, apart) for split, apart in separate.items() if apart)]
    corpus = Corpus(groups, text_field, rules, given)
    info: dict[str, Any] = {
        "sources": [str(source) for source in sources],
        "validation_sources": [str(source) for source in validation],
        "test_sources": [str(source) for source in test],
        "text_field": text_field,
        "rules": rules.model_dump(mode="json"),
        "tokenizer": str(tokenizer),
    }
    options = {
        **info,
        "tokenizer_sha256": given and given.sha256,
        "eos_token": given and given.eos_token,
        "validation_fraction": fraction,
        "shard_tokens": shard_tokens,
    }
    plan = Plan(options=options, files=describe_files(corpus.files()))
    if not _was_finished(out, plan):
        require_free(out)
        with work_directory(out) as work, _explained(out, work, say):
            progress = work.resume(plan, say) or _begin(corpus, work, plan, fraction)
            made = given or _trained(corpus, work, progress, bpe_size)
            tokenizing = Tokenizing(corpus, work, progress, made, _split_names(test), shard_tokens)
            if not progress.sealed:
                where = engine or LocalEngine(1 if isinstance(made, ByteTokenizer) else None)
                with _tokenizing_bar(corpus, plan, progress) as on_progress:
                    progress = tokenizing.run(where, on_progress)
            _check_result(corpus, work, plan, progress)
            _write_description(work, info, progress, made, tokenizing.corpus_sha256())
            put_in_place(work.data, out)
            work.remove()
    return DataDirectory.open(out)


def _split_names(test: Sequence[str | Path]) -> tuple[str, ...]:
    return (*SPLIT_NAMES, "test") if test else SPLIT_NAMES


def _was_finished(out: Path, plan: Plan) -> bool:
    """Whether ``out`` is complete, and an earlier run was killed before it had tidied up, which is done here."""
    if not (out / DATASET_FILE).is_file() or not work_path(out).is_dir():
        return False
    with work_directory(out) as work:
        before = work.plan()
        if work.data.exists():
            return False
        finished = before is not None and before.difference(plan) is None
        work.remove()
    return finished


def _begin(corpus: Corpus, work: WorkDirectory, plan: Plan, fraction: float) -> Progress:
    work.begin(plan)
    with progress_bar("reading", None, "MB") as bar:
        found = survey(corpus, fraction, lambda size: bar.advance(size / 1e6))
    progress = Progress(rule=found.rule, surveyed_bytes=found.utf8_bytes)
    work.record(progress)
    return progress


def _trained(corpus: Corpus, work: WorkDirectory, progress: Progress, size: int) -> Tokenizer:
    """The BPE that this work trained before, or trains here."""
    if not work.tokenizer.is_dir():
        with progress_bar("reading", None, "MB") as bar:
            made = train_bpe(_training_texts(corpus, progress, bar), size)
        scratch = work.tokenizer.with_suffix(".incomplete")
        scratch.mkdir(exist_ok=True)
        made.save(scratch)
        put_in_place(scratch, work.tokenizer)
    return load_tokenizer(work.tokenizer)


def _training_texts(corpus: Corpus, progress: Progress, bar: ProgressBar) -> Iterator[str]:
    start = 0
    for content in Reading(corpus):
        for part in divide(content, start, progress.rule):
            if part.split == "train" and isinstance(part.body, str):
                yield part.body
        start += content.utf8_bytes
        bar.advance(content.utf8_bytes / 1e6)


@contextmanager
def _tokenizing_bar(corpus: Corpus, plan: Plan, begun: Progress) -> Iterator[Callable[[Progress], None]]:
    estimate = SizeEstimate(corpus, plan.files)
    done = sum(begun.utf8_bytes.values())
    with progress_bar("tokenizing", None, "MB", done=done / 1e6) as bar:

        def show(progress: Progress) -> None:
            nonlocal done
            size = sum(progress.utf8_bytes.values())
            total = begun.surveyed_bytes or estimate.total(Position(*progress.position), size)
            bar.expect(None if total is None else total / 1e6)
            bar.advance((size - done) / 1e6)
            bar.note(f"{progress.documents:,} documents")
            done = size

        show(begun)
        yield show


def _check_result(corpus: Corpus, work: WorkDirectory, plan: Plan, progress: Progress) -> None:
    """Refuse what cannot be right; nothing of it is worth keeping."""
    found = sum(progress.utf8_bytes.values())
    empty = [split for split, written in progress.splits.items() if not written.documents]
    message = None
    if describe_files(corpus.files()) != plan.files:
        message = "sources: changed while they were read; run the same command again"
    elif progress.surveyed_bytes not in (None, found) and len(corpus.groups) == 1:
        message = f"sources: changed while they were read: found {progress.surveyed_bytes} bytes of text, then {found}"
    elif empty:
        message = (
            f"sources: {found} bytes of text are too few to divide: nothing is left for "
            f"{' and '.join(empty)}; give more text or separate validation documents"
        )
    if message is not None:
        work.remove()
        raise TokenFormerError(message)


def _write_description(
    work: WorkDirectory, info: dict[str, Any], progress: Progress, tokenizer: Tokenizer, sha256: str
) -> None:
    splits = {}
    for split, written in progress.splits.items():
        shards = len(written.shard_documents)
        name_shards(work.data, split, shards)
        splits[split] = SplitInfo(
            documents=written.documents,
            tokens=written.tokens,
            utf8_bytes=progress.utf8_bytes.get(split, 0),
            shards=shards,
        )
    tokenizer.save(work.data)
    description = DatasetInfo(
        **info,
        split_rule=progress.rule,
        splits=splits,
        skipped=dict(sorted(progress.skipped.items())),
        corpus_sha256=sha256,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        padded_vocab_size=tokenizer.padded_vocab_size,
        dtype=str(token_dtype(tokenizer.padded_vocab_size)),
    )
    write_json(work.data / DATASET_FILE, description.model_dump(mode="json"))


@contextmanager
def _explained(out: Path, work: WorkDirectory, say: Say) -> Iterator[None]:
    """Keep what is done when the block fails, and say so; remove it where it is of no use."""
    try:
        yield
    except BrokenDocument:
        work.remove()
        raise
    except KeyboardInterrupt:
        say(f"interrupted{_kept(work)}")
        raise
    except TokenFormerError as error:
        raise TokenFormerError(f"{error}{_kept(work)}") from error
    except OSError as error:
        reason = f"{out}: could not be written ({error.strerror or error})"
        raise TokenFormerError(f"{reason}{_kept(work)}") from error
    except Exception:
        _kept(work)
        raise


def _kept(work: WorkDirectory) -> str:
    """What is left of the work, for the end of a message; what is not worth keeping is removed."""
    progress = work.progress()
    blocks = progress.blocks if progress else 0
    if not blocks and not work.tokenizer.is_dir():
        work.remove()
        return ""
    what = f"{blocks} finished block{'s' * (blocks != 1)}" if blocks else "the trained tokenizer"
    return f"; {what} kept in {work.path}: the same command goes on from there"


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
        if is_hub_tokenizer(str(tokenizer)):
            return fetch_tokenizer(str(tokenizer), eos_token=eos_token)
        raise TokenFormerError(
            f"tokenizer: found '{tokenizer}', expected byte, bpe:N, the path of a tokenizer.json or of a folder with "
            "one, or hf:NAME"
        )
    return load_tokenizer(tokenizer, eos_token=eos_token)
