"""Every kind of source, from files made here, and what is said of those that are broken."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenformer.errors import TokenFormerError
from tokenformer.language.documents import check_sources, read_documents
from tokenformer.language.sources.hub import HubSource
from tokenformer.language.sources.records import Document

TEXTS = [f"document {i}: größe 😀\n" for i in range(1500)]


def pack_zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


PACKERS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": pack_zst}
Pack = Callable[[bytes], bytes]


def texts(source: Path | str, **options: object) -> list[str]:
    return [document.text for document in read_documents(source, **options)]  # type: ignore[arg-type]


def refused(source: Path | str, message: str, **options: object) -> None:
    with pytest.raises(TokenFormerError, match=message):
        texts(source, **options)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class TestPacked:
    @pytest.mark.parametrize(("suffix", "pack"), PACKERS.items())
    @pytest.mark.parametrize("kind", ["jsonl", "json", "txt"])
    def test_the_documents_are_those_of_the_plain_file(
        self, tmp_path: Path, suffix: str, pack: Pack, kind: str
    ) -> None:
        content = {
            "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
            "json": json.dumps(TEXTS),
            "txt": "".join(TEXTS),
        }[kind]
        path = tmp_path / f"a.{kind}{suffix}"
        path.write_bytes(pack(content.encode()))
        assert texts(path) == (["".join(TEXTS)] if kind == "txt" else TEXTS)

    @pytest.mark.parametrize(("suffix", "pack"), PACKERS.items())
    def test_damage_is_named_and_never_passed_over(self, tmp_path: Path, suffix: str, pack: Pack) -> None:
        whole = pack("".join(TEXTS).encode())
        path = tmp_path / f"a.txt{suffix}"
        for content in (b"not packed at all, but text", whole[:-5], whole[: len(whole) // 2]):
            path.write_bytes(content)
            message = rf"a\.txt{suffix}: damaged or not a {suffix} file"
            refused(path, message)
            refused(path, message, on_error="skip")

    def test_zst_frames_follow_one_another(self, tmp_path: Path) -> None:
        skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
        path = tmp_path / "a.txt.zst"
        path.write_bytes(pack_zst(b"one\n") + skippable + pack_zst(b"") + pack_zst(b"two\n"))
        assert texts(path) == ["one\ntwo\n"]

    @pytest.mark.parametrize("name", ["a.txt.zst", "a.parquet", "a.arrow", "hf:some/data"])
    def test_a_missing_package_is_named_with_the_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        package = {"zst": "zstandard", "hf:": "datasets"}.get(
            name[-3:] if ":" not in name else "hf:", "pyarrow"
        )
        for module in [m for m in sys.modules if m.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
        source = name if ":" in name else tmp_path / name
        if isinstance(source, Path):
            source.write_bytes(b"content")
        refused(source, rf"{name}: reading this needs {package}.*pip install 'tokenformer\[data\]'")


class TestJson:
    @pytest.mark.parametrize(
        ("content", "found"),
        [
            ('["one", {"text": "two", "id": 3}]', [("one", 1), ("two", 1)]),
            ('\ufeff\n[\n  "one",\n\n  {\n "text": "two"}\n]\n', [("one", 3), ("two", 5)]),
            ('{"version": "[]", "x": 1}', None),
            (
                '{"a, [": {"b": [1, 2]},\n "data" :\n [{"text": "one"},\n "two" ] , "z": 1}',
                [("one", 3), ("two", 4)],
            ),
            ('{"text": "the only one", "tags": ["x"]}', [("the only one", 1)]),
            ('{"data": ["old"], "data": ["new"]}', [("new", 1)]),
            ("[]", []),
            ('{"data": []}', []),
        ],
    )
    def test_items_are_documents_with_their_lines(
        self, tmp_path: Path, content: str, found: list[tuple[str, int]] | None
    ) -> None:
        path = tmp_path / "a.json"
        path.write_text(content, encoding="utf-8")
        if found is None:
            refused(path, r"a\.json: an object with 0 lists")
        else:
            assert list(read_documents(path)) == [Document(text, f"{path}:{line}") for text, line in found]

    @settings(deadline=None)
    @given(
        items=st.lists(
            st.text(st.characters(exclude_categories=["Cs"]))
            | st.fixed_dictionaries({"text": st.text('a[]{},"\\\n')})
        ),
        before=st.dictionaries(st.text(max_size=5), st.text('[]{},:"') | st.integers(), max_size=3),
        indent=st.none() | st.integers(0, 3),
        ascii_only=st.booleans(),
    )
    def test_any_list_is_read_whole(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        items: list[str | dict[str, str]],
        before: dict[str, object],
        indent: int | None,
        ascii_only: bool,
    ) -> None:
        path = tmp_path_factory.mktemp("json") / "a.json"
        before.pop("text", None)
        value = {**before, "docs": items} if before else items
        path.write_text(
            json.dumps(value, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", newline=""
        )
        assert texts(path) == [item if isinstance(item, str) else item["text"] for item in items]

    @pytest.mark.parametrize(
        ("content", "message", "reason"),
        [
            ('[\n"a",\n}', r"a\.json:3: invalid JSON at column 1", "invalid JSON"),
            ('["a"', r"a\.json:1: invalid JSON", "invalid JSON"),
            ('["a"]\n["b"]', r"a\.json:2: invalid JSON at column 1 \(Extra data\)", "invalid JSON"),
            ("", r"a\.json:1: invalid JSON", "invalid JSON"),
            ("[" * 100_000, r"a\.json: JSON nested too deeply", "invalid JSON"),
            ('"text"', r"a\.json: found a JSON str, expected a list", "not a list"),
            ('{"a": ["x"], "b": []}', r"a\.json: an object with 2 lists \(a, b\)", "without one list"),
            ('["fine",\n{"body": 1}]', r"a\.json:2: no field 'text'; found body", "without the text field"),
            ('["fine",\n\n7]', r"a\.json:3: found a JSON int, expected an object", "not an object"),
            ('["\\ud83d"]', r"a\.json:1: field 'text' holds half a surrogate pair", "not Unicode"),
            ('{"text": null}', r"a\.json:1: field 'text' is a NoneType", "not a string"),
        ],
    )
    def test_faults_stop_or_are_counted(
        self, tmp_path: Path, content: str, message: str, reason: str
    ) -> None:
        path = tmp_path / "a.json"
        path.write_text(content)
        refused(path, message)
        skipped: Counter[str] = Counter()
        assert texts(path, on_error="skip", skipped=skipped) == (["fine"] if "fine" in content else [])
        assert skipped == {reason: 1}


def test_broken_lines_are_counted_and_the_others_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "one"}\n{"text": "\xff"}\n{"text": \n{"body": "x"}\n["x"]\n{"text": 3}\n'
        b'{"text": "\\ud83d"}\n' + b"[" * 100_000 + b'\n\n{"text": "two"}'
    )
    skipped: Counter[str] = Counter()
    found = list(read_documents(path, on_error="skip", skipped=skipped))
    assert found == [Document("one", f"{path}:1"), Document("two", f"{path}:10")]
    assert skipped == {
        "not UTF-8": 1, "invalid JSON": 2, "without the text field": 1, "not an object": 1,
        "not a string": 1, "not Unicode": 1,
    }  # fmt: skip
    (tmp_path / "b.txt").write_bytes(b"\xff")
    assert texts(tmp_path / "b.txt", on_error="skip", skipped=skipped) == []
    assert skipped["not UTF-8"] == 2


def invalid_string_array() -> pa.Array:
    return pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"okx\xff")]
    )


def write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, row_group_size=400)


def write_arrow_stream(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=400)


def write_arrow_file(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=400)


TABLES = [("a.parquet", write_parquet), ("a.arrow", write_arrow_stream), ("a.arrow", write_arrow_file)]


@pytest.mark.parametrize(("name", "write"), TABLES)
class TestTables:
    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
    def test_rows_are_documents(
        self, tmp_path: Path, name: str, write: Callable[..., None], kind: pa.DataType
    ) -> None:
        table = pa.table({"id": range(len(TEXTS)), "body": pa.array(TEXTS).cast(kind)})
        write(table, tmp_path / name)
        found = list(read_documents(tmp_path / name, text_field="body"))
        assert [document.text for document in found] == TEXTS
        assert found[1234].name == f"{tmp_path / name}: row 1235"

    def test_missing_texts_stop_or_are_counted(
        self, tmp_path: Path, name: str, write: Callable[..., None]
    ) -> None:
        write(pa.table({"text": ["one", None, "two"]}), tmp_path / name)
        refused(tmp_path / name, rf"{name}: row 2: field 'text' is a NoneType, expected a string")
        skipped: Counter[str] = Counter()
        assert texts(tmp_path / name, on_error="skip", skipped=skipped) == ["one", "two"]
        assert skipped == {"not a string": 1}

    def test_text_that_is_not_utf8(self, tmp_path: Path, name: str, write: Callable[..., None]) -> None:
        write(pa.table({"text": invalid_string_array()}), tmp_path / name)
        refused(tmp_path / name, rf"{name}: row 2: not UTF-8 text: byte 0xff at offset 1 of the text")
        skipped: Counter[str] = Counter()
        assert texts(tmp_path / name, on_error="skip", skipped=skipped) == ["ok"]
        assert skipped == {"not UTF-8": 1}

    def test_columns_that_hold_no_text(self, tmp_path: Path, name: str, write: Callable[..., None]) -> None:
        write(pa.table({"id": [1], "tags": [["x"]]}), tmp_path / name)
        refused(tmp_path / name, rf"{name}: no column 'text'; found id, tags", on_error="skip")
        refused(tmp_path / name, rf"{name}: column 'id' is int64, expected string", text_field="id")
        refused(tmp_path / name, rf"{name}: column 'tags' is list<", text_field="tags")

    def test_damage(self, tmp_path: Path, name: str, write: Callable[..., None]) -> None:
        path = tmp_path / name
        write(pa.table({"text": TEXTS}), path)
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], b"this is no table at all, only text", b""):
            path.write_bytes(content)
            refused(path, rf"{name}: damaged or not a {path.suffix} file", on_error="skip")

    def test_one_packed_again_is_refused(self, tmp_path: Path, name: str, write: Callable[..., None]) -> None:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"x"))
        refused(tmp_path / f"{name}.gz", rf"{name}\.gz: a packed \.\w+ file")


class TestSavedDatasets:
    def test_shards_are_read_in_their_order(self, tmp_path: Path) -> None:
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved", num_shards=3)
        assert len(list((tmp_path / "saved").glob("*.arrow"))) == 3
        assert texts(tmp_path / "saved") == TEXTS

    def test_chosen_rows_are_those_saved(self, tmp_path: Path) -> None:
        datasets.Dataset.from_dict({"text": TEXTS}).select([5, 3, 700]).save_to_disk(tmp_path / "saved")
        assert texts(tmp_path / "saved") == [TEXTS[5], TEXTS[3], TEXTS[700]]

    def test_one_of_several_splits_is_to_be_named(self, tmp_path: Path) -> None:
        train, test = (datasets.Dataset.from_dict({"text": [name]}) for name in ("a", "b"))
        datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
        refused(
            tmp_path / "both",
            r"both: a dataset with the splits train, test; name one of them, e\.g\. .*train",
        )
        assert texts(tmp_path / "both" / "test") == ["b"]
        datasets.DatasetDict({"train": train}).save_to_disk(tmp_path / "one")
        assert texts(tmp_path / "one") == ["a"]

    def test_inside_a_folder_it_stands_for_its_files(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        datasets.Dataset.from_dict({"text": ["two"]}).save_to_disk(folder / "b")
        pq.write_table(pa.table({"text": ["three"]}), folder / "c.parquet")
        (folder / "a.txt").write_text("one")
        assert texts(folder) == ["one", "two", "three"]

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"_data_files": [{"filename": "../x.arrow"}]}, "expected a list of file names"),
            ({"_data_files": "x.arrow"}, "expected a list of file names"),
            ({}, "expected a list of file names"),
            ({"_data_files": [{"filename": "gone.arrow"}]}, r"gone\.arrow: cannot be read \(No such file"),
            ({"_data_files": [], "_indices_data_files": [{}]}, r"dataset\.flatten_indices\(\)"),
        ],
    )
    def test_wrong_descriptions(self, tmp_path: Path, state: dict[str, object], message: str) -> None:
        (tmp_path / "dataset_info.json").write_text("{}")
        (tmp_path / "state.json").write_text(json.dumps(state))
        refused(tmp_path, message)

    def test_splits_outside_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["../x"]}')
        refused(tmp_path, "expected a list of folder names")


class TestGlobs:
    def test_matches_are_read_sorted_without_hidden_files(self, tmp_path: Path) -> None:
        for name in ("b", "c", "a", ".no"):
            (tmp_path / f"{name}.jsonl.xz").write_bytes(lzma.compress(json.dumps({"text": name}).encode()))
        (tmp_path / "other.txt").write_text("no")
        assert texts(tmp_path / "*.jsonl.xz") == ["a", "b", "c"]
        assert texts(tmp_path / "[ab].jsonl.xz") == ["a", "b"]

    def test_nothing_is_read_twice(self, tmp_path: Path) -> None:
        (tmp_path / "x" / "y").mkdir(parents=True)
        (tmp_path / "x" / "y" / "a.txt").write_text("a")
        (tmp_path / "x" / "b.txt").write_text("b")
        assert texts(tmp_path / "**") == ["b", "a"]
        assert texts(tmp_path / "**" / "*.txt") == ["b", "a"]
        assert texts(tmp_path / "x" / "*") == ["b", "a"]

    def test_without_a_match_it_is_refused_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(TokenFormerError, match=r"\*\.parquet: no file or folder matches this glob"):
            check_sources([tmp_path, tmp_path / "*.parquet"])

    def test_a_file_with_such_a_name_is_that_file(self, tmp_path: Path) -> None:
        (tmp_path / "a[1].txt").write_text("a")
        (tmp_path / "a1.txt").write_text("b")
        assert texts(tmp_path / "a[1].txt") == ["a"]


class TestHub:
    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("hf:enwik8", ("enwik8", "", "train")),
            ("hf:allenai/c4:en", ("allenai/c4", "en", "train")),
            ("hf:a/b:c:test", ("a/b", "c", "test")),
            ("hf:a/b::validation", ("a/b", "", "validation")),
        ],
    )
    def test_the_parts_of_a_name(self, source: str, expected: tuple[str, str, str]) -> None:
        assert HubSource.parse(source) == HubSource(*expected)

    @pytest.mark.parametrize("source", ["hf:", "hf::x", "hf:a:b:c:d"])
    def test_other_forms_are_refused_before_reading(self, source: str) -> None:
        with pytest.raises(TokenFormerError, match=rf"{source}: expected hf:NAME\[:config\]\[:split\]"):
            check_sources([source])

    @pytest.fixture
    def repository(self, tmp_path: Path) -> Path:
        """A dataset as the hub keeps it: data files and a card with its configurations."""
        folder = tmp_path / "repository"
        folder.mkdir()
        pq.write_table(pa.table({"text": TEXTS[:3]}), folder / "one.parquet")
        pq.write_table(pa.table({"text": TEXTS[3:5]}), folder / "two.parquet")
        pq.write_table(pa.table({"text": TEXTS[5:9], "id": range(4)}), folder / "three.parquet")
        (folder / "README.md").write_text(
            "---\nconfigs:\n"
            "- config_name: lines\n  default: true\n  data_files:\n"
            "  - {split: train, path: one.parquet}\n  - {split: test, path: two.parquet}\n"
            "- config_name: table\n  data_files:\n  - {split: train, path: three.parquet}\n---\n"
        )
        return folder

    def test_configurations_and_splits_are_streamed(self, repository: Path) -> None:
        assert texts(f"hf:{repository}") == TEXTS[:3]
        assert texts(f"hf:{repository}::test") == TEXTS[3:5]
        assert texts(f"hf:{repository}:table") == TEXTS[5:9]
        last = list(read_documents(f"hf:{repository}:table:train"))[-1]
        assert last.name == f"hf:{repository}:table:train: row 4"

    @pytest.mark.parametrize(
        ("rest", "message"),
        [
            ("::dev", "Bad split: dev"),
            (":other", "BuilderConfig 'other' not found"),
            (":table:test", "Bad split"),
        ],
    )
    def test_what_is_not_in_it_is_named(self, repository: Path, rest: str, message: str) -> None:
        refused(f"hf:{repository}{rest}", rf"cannot be read by the datasets library \(ValueError: {message}")

    def test_a_missing_column(self, repository: Path) -> None:
        refused(f"hf:{repository}:table", "no column 'body'; found text, id", text_field="body")

    def test_broken_rows_stop_or_are_counted(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
        refused(f"hf:{tmp_path}", rf"{tmp_path}: row 2: field 'text' is a NoneType")
        skipped: Counter[str] = Counter()
        assert texts(f"hf:{tmp_path}", on_error="skip", skipped=skipped) == ["a", "b"]
        assert skipped == {"not a string": 1}

    def test_damage_met_on_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
        refused(f"hf:{tmp_path}", "cannot be read by the datasets library", on_error="skip")

    def test_without_the_hub_the_local_way_is_named(self) -> None:
        refused(
            "hf:nobody/nothing",
            r"hf:nobody/nothing: cannot be read .*access to the Hugging Face hub.*"
            r"hf download --repo-type dataset nobody/nothing --local-dir DIR",
        )
