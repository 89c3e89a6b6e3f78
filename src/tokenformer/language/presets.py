"""Well-known corpora by name: where they are on the Hugging Face hub, their published splits, their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from tokenformer.errors import TokenFormerError
from tokenformer.language.sources.hub import HubSource
from tokenformer.validation import nearest

PRESET_PREFIX = "preset:"

_MB = 1_000_000
_RANGES = {"train": (0, 90 * _MB), "validation": (90 * _MB, 95 * _MB), "test": (95 * _MB, 100 * _MB)}


class Preset(NamedTuple):
    """A corpus with its published splits.

    ``hub`` and ``files`` say by split where it is on the hub, and what its files are called (globs, of which the
    first with a match counts). ``documents``: each row or record is one; ``articles`` begin at the level-1
    headings of a text; ``ranges`` are bytes of one file, and also of the one text on the hub if ``whole_on_hub``.
    """

    name: str
    summary: str
    hub: Mapping[str, HubSource]
    files: Mapping[str, tuple[str, ...]]
    documents: Literal["rows", "articles", "ranges"] = "rows"
    ranges: Mapping[str, tuple[int, int]] = {}
    whole_on_hub: bool = False
    text_field: str = "text"

    @property
    def size(self) -> int:
        """Bytes of the one file that ``ranges`` are of."""
        return max(stop for _, stop in self.ranges.values())

    def local_files(self, split: str, path: Path) -> list[Path]:
        """The files of a split in a local copy at ``path``, sorted.

        Raises:
            TokenFormerError: there are none.
        """
        if path.is_file() and (self.documents == "ranges" or len(self.hub) == 1):
            return [path]
        for pattern in self.files[split] if path.is_dir() else ():
            found = sorted(path.glob(pattern))
            if found:
                return found
        state = "found a file" if path.is_file() else "none is there" if path.is_dir() else "nothing is there"
        raise TokenFormerError(
            f"{path}: no local copy of the {split} split of {self.name} ({state}); expected a folder with "
            f"{' or '.join(self.files[split])}"
        )


class PresetSource(NamedTuple):
    """``preset:NAME[:SPLIT][=PATH]``; an empty ``split`` stands for all, without ``path`` it is read from the hub."""

    preset: Preset
    split: str
    path: str

    @classmethod
    def parse(cls, source: str) -> PresetSource:
        """Take a source apart.

        Raises:
            TokenFormerError: it has another form, or there is no such preset or split.
        """
        name, equals, path = source.removeprefix(PRESET_PREFIX).partition("=")
        name, _, split = name.partition(":")
        if not name or (equals and not path):
            raise TokenFormerError(
                f"{source}: expected preset:NAME[:SPLIT][=PATH], e.g. preset:enwik8, "
                "preset:wikitext-2:test or preset:enwik8=downloads/enwik8.zip"
            )
        preset = PRESETS.get(name)
        if preset is None:
            raise TokenFormerError(f"{source}: no preset '{name}'{nearest(name, PRESETS)}")
        if split and split not in preset.hub:
            raise TokenFormerError(f"{source}: {name} has no split '{split}'; found {', '.join(preset.hub)}")
        return cls(preset, split, path)

    def with_split(self, split: str) -> PresetSource:
        """The same with a split, where none is named.

        Raises:
            TokenFormerError: it has no such split.
        """
        return self if self.split else PresetSource.parse(str(self._replace(split=split)))

    def local_files(self) -> list[Path]:
        """The files of a local copy, of which there are some; none without ``path``.

        Raises:
            TokenFormerError: they are not there.
        """
        return self.preset.local_files(self.split, Path(self.path)) if self.path else []

    def __str__(self) -> str:
        split = f":{self.split}" if self.split else ""
        return f"{PRESET_PREFIX}{self.preset.name}{split}{'=' if self.path else ''}{self.path}"


class SplitSources(NamedTuple):
    """The sources of each split."""

    train: list[str]
    validation: list[str]
    test: list[str]


def expand_presets(
    sources: Sequence[str | Path],
    validation: Sequence[str | Path] = (),
    test: Sequence[str | Path] = (),
) -> SplitSources:
    """Put each preset's splits where they belong; other sources stay as they are.

    A preset among ``sources`` brings all its splits, or the one that is named; among ``validation`` or ``test`` it
    stands for that split.

    Raises:
        TokenFormerError: an unknown preset or split; or documents given for a split that a preset brings too.
    """
    expanded = SplitSources([], _with_split(validation, "validation"), _with_split(test, "test"))
    given = {"validation": bool(validation), "test": bool(test)}
    for source in map(str, sources):
        if not source.startswith(PRESET_PREFIX):
            expanded.train.append(source)
            continue
        wanted = PresetSource.parse(source)
        for split in (wanted.split,) if wanted.split else wanted.preset.hub:
            if not wanted.split and given.get(split):
                raise TokenFormerError(
                    f"{split}: {source} brings its own {split} documents; take only its training documents with "
                    f"{wanted._replace(split='train')}"
                )
            part = str(wanted._replace(split=split))
            (expanded.train if wanted.split else getattr(expanded, split)).append(part)
    return expanded


def _with_split(sources: Sequence[str | Path], split: str) -> list[str]:
    return [
        str(PresetSource.parse(source).with_split(split)) if source.startswith(PRESET_PREFIX) else source
        for source in map(str, sources)
    ]


def _on_hub(name: str, config: str = "", splits: Sequence[str] = ("train",)) -> dict[str, HubSource]:
    return {split: HubSource(name, config, split) for split in splits}


_ALL = ("train", "validation", "test")


def _wikitext(name: str) -> Preset:
    config = f"{name}-raw-v1"
    short = {"train": "train", "validation": "valid", "test": "test"}
    return Preset(
        name,
        "Wikipedia's good and featured articles, an article a document; from the hub the raw text, without <unk>",
        _on_hub("Salesforce/wikitext", config, _ALL),
        {
            split: (
                f"wiki.{short[split]}.raw*",
                f"wiki.{short[split]}.tokens*",
                f"{short[split]}.txt*",
                f"{config}/{split}-*.parquet",
                f"{split}-*.parquet",
            )
            for split in _ALL
        },
        documents="articles",
    )


def _ranges(name: str, summary: str, hub: Mapping[str, HubSource], *, whole_on_hub: bool) -> Preset:
    files = dict.fromkeys(_ALL, (name, f"{name}.*"))
    return Preset(name, summary, hub, files, "ranges", _RANGES, whole_on_hub)


_PARQUET = ("*.parquet", "**/*.parquet")

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _ranges(
            "enwik8",
            "the first 10^8 bytes of a Wikipedia dump, cut after 90 and 95 million bytes",
            dict.fromkeys(
                _ALL,
                # the repository itself holds a loading script, which the library refuses; this is the hub's copy
                HubSource("LTCB/enwik8", "", "train", "refs/convert/parquet", "enwik8-raw/train/*.parquet"),
            ),
            whole_on_hub=True,
        ),
        _ranges(
            "text8",
            "10^8 characters of Wikipedia, a to z and spaces, cut after 90 and 95 million",
            _on_hub("afmck/text8", splits=_ALL),
            whole_on_hub=False,
        ),
        _wikitext("wikitext-2"),
        _wikitext("wikitext-103"),
        Preset(
            "openwebtext",
            "8,013,769 web pages that Reddit linked to",
            _on_hub("Skylion007/openwebtext"),
            {"train": (*_PARQUET, "**/*.txt*")},
        ),
        Preset(
            "openwebtext2",
            "its successor; on the hub a cleaned version in English, elsewhere the original .jsonl.zst files",
            _on_hub("Geralt-Targaryen/openwebtext2"),
            {"train": ("*.jsonl.zst", "*.jsonl", *_PARQUET)},
        ),
        Preset(
            "pile",
            "the Pile; on the hub without the parts under copyright, elsewhere also the original files",
            _on_hub("monology/pile-uncopyrighted", splits=_ALL),
            {
                "train": ("train/*.jsonl.zst", "train/*.jsonl"),
                "validation": ("val.jsonl.zst", "val.jsonl"),
                "test": ("test.jsonl.zst", "test.jsonl"),
            },
        ),
        Preset(
            "fineweb-edu",
            "educational web pages, the sample of ten billion tokens",
            _on_hub("HuggingFaceFW/fineweb-edu", "sample-10BT"),
            {"train": ("sample/10BT/*.parquet", *_PARQUET)},
        ),
    )
}
