"""Well-known corpora by name: from local copies made here, and from a hub that is stood in for."""

from __future__ import annotations

import gzip
import json
import lzma
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.errors import TokenFormerError
from tokenformer.language.documents import check_sources, read_documents
from tokenformer.language.prepare import prepare
from tokenformer.language.presets import PRESETS, PresetSource, expand_presets
from tokenformer.language.sources.published_texts import articles
from tokenformer.language.sources.records import Document

RANGES = {"train": (0, 900), "validation": (900, 950), "test": (950, 1000)}
WIKI = (
    " \n = One = \n \n Some text . \n \n = = Part = = \n \n = not a heading = \n More . \n \n"
    " = Two = \n \n Wins ; L = 3 \n \n \n = Three = \n \n The end . \n"
)
ARTICLES = [
    " \n = One = \n \n Some text . \n \n = = Part = = \n \n = not a heading = \n More . \n \n",
    " = Two = \n \n Wins ; L = 3 \n \n \n",
    " = Three = \n \n The end . \n",
]


def texts(source: str, **options: Any) -> list[str]:
    return [document.text for document in read_documents(source, **options)]


def refused(source: str, message: str) -> None:
    with pytest.raises(TokenFormerError, match=message):
        texts(source)


class TestNames:
    @pytest.mark.parametrize(
        ("source", "name", "split", "path"),
        [
            ("preset:enwik8", "enwik8", "", ""),
            ("preset:enwik8=a/b=c:d.zip", "enwik8", "", "a/b=c:d.zip"),
            ("preset:pile:test=x", "pile", "test", "x"),
        ],
    )
    def test_the_parts_of_a_name(self, source: str, name: str, split: str, path: str) -> None:
        found = PresetSource.parse(source)
        assert (found.preset.name, found.split, found.path) == (name, split, path)
        assert str(found) == source

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("preset:", r"expected preset:NAME\[:SPLIT\]\[=PATH\]"),
            ("preset:enwik8=", r"expected preset:NAME\[:SPLIT\]\[=PATH\]"),
            ("preset:enwik9", "no preset 'enwik9'; did you mean 'enwik8'"),
            ("preset:openwebtext:test", "openwebtext has no split 'test'; found train"),
            (
                "preset:enwik8=/nowhere",
                "/nowhere: no local copy of the train split of enwik8.*nothing is there",
            ),
        ],
    )
    def test_others_are_refused_before_reading(self, source: str, message: str) -> None:
        with pytest.raises(TokenFormerError, match=message):
            check_sources([source])

    def test_those_that_were_asked_for_are_there(self) -> None:
        assert list(PRESETS) == [
            "enwik8", "text8", "wikitext-2", "wikitext-103", "openwebtext", "openwebtext2", "pile", "fineweb-edu",
        ]  # fmt: skip
        for preset in PRESETS.values():
            assert set(preset.files) == set(preset.hub)
            assert preset.documents != "ranges" or set(preset.ranges) == set(preset.hub)
        for name in ("enwik8", "text8"):
            assert list(PRESETS[name].ranges.values()) == [
                (0, 90_000_000), (90_000_000, 95_000_000), (95_000_000, 100_000_000),
            ]  # fmt: skip

    def test_splits_go_where_they_belong(self) -> None:
        found = expand_presets(["a.txt", "preset:pile=p", "preset:openwebtext"])
        assert found.train == ["a.txt", "preset:pile:train=p", "preset:openwebtext:train"]
        assert (found.validation, found.test) == (["preset:pile:validation=p"], ["preset:pile:test=p"])
        named = expand_presets(["preset:pile:train"], ["preset:text8", "preset:pile:test"], ["t.txt"])
        assert named.train == ["preset:pile:train"]
        assert named.validation == ["preset:text8:validation", "preset:pile:test"]
        assert named.test == ["t.txt"]

    @pytest.mark.parametrize(("split", "message"), [("validation", "validation"), ("test", "test")])
    def test_two_sources_of_a_split_are_refused(self, split: str, message: str) -> None:
        with pytest.raises(
            TokenFormerError, match=rf"{message}: preset:pile brings its own .*preset:pile:train"
        ):
            expand_presets(["preset:pile"], **{split: ["a.txt"]})


@pytest.fixture
def thousand(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A text of 1000 bytes, which enwik8 and text8 are of here; a character lies across byte 900."""
    for name in ("enwik8", "text8"):
        monkeypatch.setitem(PRESETS, name, PRESETS[name]._replace(ranges=RANGES))
    content = ("abcdefgh\n" * 100)[:898].encode() + "😀".encode() + b"x" * 98
    assert len(content) == 1000
    return content


class TestRanges:
    @pytest.mark.parametrize("form", ["file", "zip", "gz", "folder", "folder with zip"])
    def test_a_file_is_cut_at_its_bytes(self, thousand: bytes, tmp_path: Path, form: str) -> None:
        path = tmp_path / "enwik8"
        if form.endswith("zip"):
            path = tmp_path / "enwik8.zip"
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("enwik8", thousand)
        else:
            path.write_bytes(thousand)
        if form == "gz":
            (tmp_path / "any.gz").write_bytes(gzip.compress(thousand))
            path = tmp_path / "any.gz"
        source = tmp_path if form.startswith("folder") else path
        train, validation, test = (texts(f"preset:enwik8:{split}={source}") for split in RANGES)
        assert [len(text.encode()) for (text,) in (train, validation, test)] == [898, 52, 50]
        assert (train[0] + validation[0] + test[0]).encode() == thousand

    @given(st.text(st.sampled_from("aé文😀"), min_size=1, max_size=9), st.data())
    def test_any_cut_keeps_characters_whole(
        self, tmp_path_factory: pytest.TempPathFactory, text: str, data: st.DataObject
    ) -> None:
        size = len(text.encode())
        cuts = sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2)))
        path = tmp_path_factory.mktemp("cut") / "enwik8"
        path.write_bytes(text.encode())
        bounds = [0, *cuts, size]
        ranges = {split: (bounds[i], bounds[i + 1]) for i, split in enumerate(RANGES)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PRESETS, "enwik8", PRESETS["enwik8"]._replace(ranges=ranges))
            found = [texts(f"preset:enwik8:{split}={path}")[0] for split in RANGES]
        assert "".join(found) == text
        for cut, exact in ((found[0], cuts[0]), (found[0] + found[1], cuts[1])):
            assert exact - 4 < len(cut.encode()) <= exact

    def test_the_splits_of_a_data_directory(self, thousand: bytes, tmp_path: Path) -> None:
        (tmp_path / "enwik8").write_bytes(thousand)
        data = prepare([f"preset:enwik8={tmp_path / 'enwik8'}"], tmp_path / "data")
        assert {name: split.utf8_bytes for name, split in data.info.splits.items()} == {
            "train": 898, "validation": 52, "test": 50,
        }  # fmt: skip
        assert data.info.split_rule.method == "separate"
        assert data.info.sources == [f"preset:enwik8:train={tmp_path / 'enwik8'}"]
        found = b"".join(data.tokenizer.decode(data.split(s).document(0)).encode() for s in RANGES)
        assert found == thousand

    def test_files_of_another_size_and_damage_are_refused(self, thousand: bytes, tmp_path: Path) -> None:
        path = tmp_path / "text8"
        for size, split, message in (
            (899, "train", "found 899 bytes, expected the 1,000 that it was published with"),
            (500, "validation", "found 500 bytes"),
            (999, "test", "found 999 bytes"),
            (1001, "test", "found more than 1,000 bytes"),
        ):
            path.write_bytes((thousand + b"y")[:size])
            refused(f"preset:text8:{split}={path}", rf"text8: {message}")
        path.write_bytes(thousand[:10] + b"\xff" + thousand[11:])
        refused(f"preset:text8={path}", "text8: not UTF-8 text: byte 0xff at offset 10")
        assert texts(f"preset:text8={path}", on_error="skip") == []
        (tmp_path / "text8.zip").write_bytes(b"PK no archive")
        refused(f"preset:text8={tmp_path / 'text8.zip'}", r"text8\.zip: damaged or not a \.zip file")


class TestArticles:
    def as_lines(self, text: str) -> Iterator[Document]:
        return (Document(line, f"x:{i}") for i, line in enumerate(text.splitlines(keepends=True), start=1))

    def test_they_begin_at_level_one_headings(self) -> None:
        found = list(articles(self.as_lines(WIKI)))
        assert [article.text for article in found] == ARTICLES
        assert [article.name for article in found] == ["x:1", "x:11", "x:16"]

    @given(st.lists(st.sampled_from([" \n", " = A = \n", " = = B = = \n", " text = \n"])))
    def test_nothing_is_lost(self, lines: list[str]) -> None:
        found = [article.text for article in articles(self.as_lines("".join(lines)))]
        assert "".join(found) == "".join(lines)
        assert all(article.strip() for article in found) or len(found) < 2

    def test_blank_rows_of_the_hub_and_a_heading_at_the_end(self) -> None:
        rows = ["", " = One = \n", "", " Text . \n", "", " = Two = \n"]
        found = [article.text for article in articles(Document(row, "") for row in rows)]
        assert found == [" \n = One = \n \n Text . \n \n = Two = \n"]

    @pytest.mark.parametrize("form", ["tokens", "raw", "txt.xz", "parquet"])
    def test_local_copies(self, tmp_path: Path, form: str) -> None:
        for split, short in {"train": "train", "validation": "valid", "test": "test"}.items():
            content = WIKI.replace("One", f"One {split}")
            if form == "parquet":
                rows = [line if line.strip() else "" for line in content.splitlines(keepends=True)]
                folder = tmp_path / "wikitext-103-raw-v1"
                folder.mkdir(exist_ok=True)
                for number, part in enumerate((rows[:8], rows[8:])):  # an article goes on in the second file
                    pq.write_table(pa.table({"text": part}), folder / f"{split}-{number:05}-of-00002.parquet")
            elif form == "txt.xz":
                (tmp_path / f"{short}.txt.xz").write_bytes(lzma.compress(content.encode()))
            else:
                (tmp_path / f"wiki.{short}.{form}").write_text(content)
        for split in RANGES:
            found = texts(f"preset:wikitext-103:{split}={tmp_path}")
            assert found == [ARTICLES[0].replace("One", f"One {split}"), *ARTICLES[1:]]

    def test_a_broken_line_stops_or_is_counted(self, tmp_path: Path) -> None:
        (tmp_path / "wiki.train.raw").write_bytes(WIKI.encode().replace(b"Some", b"\xff"))
        source = f"preset:wikitext-2={tmp_path}"
        refused(source, rf"wiki\.train\.raw:4: .* byte 0xff at offset {WIKI.index('Some')}; expected")
        skipped: Counter[str] = Counter()
        found = texts(source, on_error="skip", skipped=skipped)
        assert found == [ARTICLES[0].replace(" Some text . \n", ""), *ARTICLES[1:]]
        assert skipped == {"not UTF-8": 1}

    def test_the_published_articles_of_wikitext_2(self, shared: Path, tmp_path: Path) -> None:
        folder = shared / "data" / "wikitext-2"
        if not folder.is_dir():
            pytest.skip(f"{folder} is not there")
        data = prepare([f"preset:wikitext-2={folder}"], tmp_path / "data")
        counts = {name: (split.documents, split.utf8_bytes) for name, split in data.info.splits.items()}
        assert counts == {
            "train": (600, 10_797_148), "validation": (60, 1_121_681), "test": (60, 1_256_449),
        }  # fmt: skip
        first = data.tokenizer.decode(data.split("test").document(1))
        assert first.startswith(" = Du Fu = \n \n Du Fu ( Wade")


class TestRows:
    def test_the_pile_as_its_files(self, tmp_path: Path) -> None:
        (tmp_path / "train").mkdir()
        for name, words in {"train/01": "c", "train/00": "a b", "val": "v", "test": "t"}.items():
            lines = "".join(json.dumps({"text": word, "meta": {}}) + "\n" for word in words.split())
            (tmp_path / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        data = prepare([f"preset:pile={tmp_path}"], tmp_path / "data")
        assert data.tokenizer.decode(data.split("train").tokens(0, 6)) == "abc"
        assert [data.split(split).num_documents for split in ("train", "validation", "test")] == [3, 1, 1]
        (tmp_path / "test.jsonl.zst").unlink()
        with pytest.raises(
            TokenFormerError, match=r"no local copy of the test split of pile.*test\.jsonl\.zst"
        ):
            prepare([f"preset:pile={tmp_path}"], tmp_path / "other")
        assert not (tmp_path / "other").exists()

    @pytest.mark.parametrize(
        ("name", "file"),
        [
            ("openwebtext", "plain_text/train-00000-of-00080.parquet"),
            ("openwebtext2", "webtext2-00000-of-00027.parquet"),
            ("fineweb-edu", "sample/10BT/000_00000.parquet"),
        ],
    )
    def test_parquet_files(self, tmp_path: Path, name: str, file: str) -> None:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": range(100), "text": [f"text {i}" for i in range(100)]}), path)
        assert len(texts(f"preset:{name}={tmp_path}", text_field="ignored")) == 100
        assert len(texts(f"preset:{name}={path}")) == 100
        data = prepare([f"preset:{name}={tmp_path}"], tmp_path / "data")  # no published split: by hash
        assert data.info.split_rule.method == "content_hash"


class TestHub:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str], list[str]]:
        """A hub that holds these rows by name, configuration and split; it records how it was asked."""
        rows: dict[tuple[str, str | None, str], list[str]] = {}

        def load_dataset(name: str, config: str | None = None, *, split: str, **options: Any) -> Any:
            assert options.pop("streaming") is True
            self.options = options
            return datasets.Dataset.from_dict({"text": rows[name, config, split]}).to_iterable_dataset()

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return rows

    def test_enwik8_is_cut_from_its_one_text(
        self, asked: dict[tuple[str, str | None, str], list[str]], thousand: bytes
    ) -> None:
        asked["LTCB/enwik8", None, "train"] = [thousand.decode()]
        found = [texts(f"preset:enwik8:{split}")[0] for split in RANGES]
        assert "".join(found).encode() == thousand
        assert len(found[0].encode()) == 898
        assert self.options == {
            "revision": "refs/convert/parquet", "data_files": "enwik8-raw/train/*.parquet",
        }  # fmt: skip
        asked["LTCB/enwik8", None, "train"] = ["short"]
        refused("preset:enwik8", "preset:enwik8:train: row 1: found 5 bytes, expected the 1,000")

    @pytest.mark.parametrize(
        ("preset", "name", "config", "splits"),
        [
            ("text8", "afmck/text8", None, list(RANGES)),
            ("wikitext-2", "Salesforce/wikitext", "wikitext-2-raw-v1", list(RANGES)),
            ("wikitext-103", "Salesforce/wikitext", "wikitext-103-raw-v1", list(RANGES)),
            ("openwebtext", "Skylion007/openwebtext", None, ["train"]),
            ("openwebtext2", "Geralt-Targaryen/openwebtext2", None, ["train"]),
            ("pile", "monology/pile-uncopyrighted", None, list(RANGES)),
            ("fineweb-edu", "HuggingFaceFW/fineweb-edu", "sample-10BT", ["train"]),
        ],
    )
    def test_each_is_asked_for_by_its_names(
        self,
        asked: dict[tuple[str, str | None, str], list[str]],
        tmp_path: Path,
        preset: str,
        name: str,
        config: str | None,
        splits: list[str],
    ) -> None:
        for split in splits:
            rows = [line if line.strip() else "" for line in WIKI.splitlines(keepends=True)]
            rows[3] = f" {split} . \n"
            asked[name, config, split] = rows if "wiki" in preset else [f"{split} {i}" for i in range(50)]
        data = prepare([f"preset:{preset}"], tmp_path / "data")
        assert list(data.info.splits) == (splits if len(splits) == 3 else ["train", "validation"])
        for split in splits:
            assert split in data.tokenizer.decode(data.split(split).document(0))
        if "wiki" in preset:
            assert data.info.splits["test"].documents == 3
        assert self.options == {"revision": None, "data_files": None}

    def test_without_the_hub_the_error_names_it(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
        refused(
            "preset:openwebtext", r"preset:openwebtext:train: cannot be read.*hf download --repo-type dataset"
        )
