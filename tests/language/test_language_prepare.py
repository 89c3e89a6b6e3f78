"""Documents to a data directory and back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenformer.errors import TokenFormerError
from tokenformer.language import prepare as prepare_module
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.prepare import prepare
from tokenformer.language.rules import DocumentRules
from tokenformer.language.tokenizers import load_tokenizer

TEXTS = [f"Document {i}: " + "größe 😀 " * (i % 5) + "\n" for i in range(200)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def read_back(data: DataDirectory, split: str) -> list[str]:
    store = data.split(split)
    documents = [store.document(i) for i in range(store.num_documents)]
    assert all(document[-1] == data.tokenizer.eos_token_id for document in documents)
    return [data.tokenizer.decode(document[:-1]) for document in documents]


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def held_out(text: str, fraction: float) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16 < fraction


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:400"])
def test_every_document_is_read_back_in_order_from_its_split(
    corpus: Path, tmp_path: Path, tokenizer: str
) -> None:
    data = prepare([corpus], tmp_path / "data", tokenizer=tokenizer, validation_fraction=0.1)
    train = [text for text in TEXTS if not held_out(text, 0.1)]
    validation = [text for text in TEXTS if held_out(text, 0.1)]
    assert 5 < len(validation) < 40
    assert read_back(data, "train") == train
    assert read_back(data, "validation") == validation

    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert info["sources"] == [str(corpus)]
    assert info["split_rule"] == {"method": "content_hash", "validation_fraction": 0.1, "cut": None}
    assert info["tokenizer"] == tokenizer
    assert info["dtype"] == "uint16"
    for name, texts in (("train", train), ("validation", validation)):
        counts = info["splits"][name]
        assert counts["documents"] == len(texts)
        assert counts["utf8_bytes"] == sum(len(text.encode()) for text in texts)
        assert counts["tokens"] == data.split(name).num_tokens
    if tokenizer == "byte":
        assert info["splits"]["train"]["tokens"] == info["splits"]["train"]["utf8_bytes"] + len(train)
    digests = b"".join(hashlib.sha256(text.encode()).digest() for text in TEXTS)
    assert info["corpus_sha256"] == hashlib.sha256(digests).hexdigest()


def test_the_files_are_those_of_a_data_directory_and_always_the_same(corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "one", tokenizer="bpe:400")
    prepare([corpus], tmp_path / "two", tokenizer="bpe:400")
    one = files_of(tmp_path / "one")
    names = ["dataset.json", "tokenizer.json", "train.bin", "train.idx", "validation.bin", "validation.idx"]
    assert sorted(one) == names
    assert one == files_of(tmp_path / "two")


def test_bpe_learns_from_the_training_documents_alone(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abc " * 100)
    (tmp_path / "validation.txt").write_text("xyz " * 100)
    data = prepare(
        [tmp_path / "train.txt"],
        tmp_path / "d",
        tokenizer="bpe:300",
        validation=[tmp_path / "validation.txt"],
    )
    assert len(data.tokenizer.encode(" abc")) == 1
    assert len(data.tokenizer.encode(" xyz")) == 4
    assert data.info.vocab_size < 300  # there was nothing more to learn


def test_a_given_tokenizer_goes_along(corpus: Path, tmp_path: Path) -> None:
    first = prepare([corpus], tmp_path / "one", tokenizer="bpe:400")
    again = prepare([corpus], tmp_path / "two", tokenizer=tmp_path / "one" / "tokenizer.json")
    assert again.tokenizer.sha256 == first.tokenizer.sha256
    assert files_of(tmp_path / "one")["train.bin"] == files_of(tmp_path / "two")["train.bin"]


def test_separate_validation_documents(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("held out\n")
    data = prepare([corpus], tmp_path / "data", validation=[tmp_path / "v.txt"])
    assert read_back(data, "train") == TEXTS
    assert read_back(data, "validation") == ["held out\n"]
    assert data.info.split_rule.method == "separate"
    with pytest.raises(TokenFormerError, match="validation_fraction: has no meaning beside separate"):
        prepare([corpus], tmp_path / "x", validation=[tmp_path / "v.txt"], validation_fraction=0.1)


def test_test_documents_are_a_split_of_their_own(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("tested\n")
    data = prepare([corpus], tmp_path / "data", test=[tmp_path / "t.txt"], validation_fraction=0.1)
    assert list(data.info.splits) == ["train", "validation", "test"]
    assert data.info.test_sources == [str(tmp_path / "t.txt")]
    assert data.info.split_rule.method == "content_hash"
    assert read_back(data, "test") == ["tested\n"]
    without = prepare([corpus], tmp_path / "without", validation_fraction=0.1)
    for split in ("train", "validation"):
        assert read_back(data, split) == read_back(without, split)
    (tmp_path / "one.txt").write_text("".join(f"line {i:03}\n" for i in range(100)))
    cut = prepare([tmp_path / "one.txt"], tmp_path / "cut", test=[corpus], validation_fraction=0.1)
    assert cut.info.split_rule.cut == 810  # of the text that is divided, whatever is given for the test
    (tmp_path / "empty.txt").touch()
    with pytest.raises(TokenFormerError, match=r"empty\.txt: an empty corpus"):
        prepare([corpus], tmp_path / "x", test=[tmp_path / "empty.txt"])


def test_of_one_text_the_last_lines_are_held_out(tmp_path: Path) -> None:
    lines = [f"line {i:04} über\n" for i in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    data = prepare([tmp_path / "a.txt"], tmp_path / "data")
    (train,), (validation,) = read_back(data, "train"), read_back(data, "validation")
    assert train + validation == "".join(lines)
    assert train.endswith("\n")
    assert 50 <= validation.count("\n") <= 51
    assert data.info.split_rule.method == "tail"


@settings(deadline=None, max_examples=60)
@example(texts=["éa"], fraction=0.5)
@example(texts=["é", "b"], fraction=0.99)
@given(
    texts=st.lists(st.text(st.sampled_from("ab\né😀"), max_size=20), min_size=1, max_size=4),
    fraction=st.floats(0.01, 0.99),
)
def test_however_few_texts_none_is_lost_and_no_side_stays_empty(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], fraction: float
) -> None:
    folder = tmp_path_factory.mktemp("few")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    characters = sum(map(len, texts))
    if characters < 2:
        with pytest.raises(TokenFormerError, match=r"an empty corpus|too few to divide"):
            prepare([folder / "a.jsonl"], folder / "data", validation_fraction=fraction)
        assert [path.name for path in folder.iterdir()] == ["a.jsonl"]
        return
    data = prepare([folder / "a.jsonl"], folder / "data", validation_fraction=fraction)
    train, validation = read_back(data, "train"), read_back(data, "validation")
    assert train
    assert validation
    if data.info.split_rule.method == "tail":
        assert "".join(train + validation) == "".join(texts)
    else:
        assert sorted(train + validation) == sorted(filter(None, texts))


def test_empty_and_binary_files_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in {"a.txt": b"one\ntwo\n", "b.txt": b"", "c.bin": b"\0\1"}.items():
        (folder / name).write_bytes(content)
    data = prepare([folder], tmp_path / "data")
    assert data.info.skipped == {"binary": 1, "empty": 1}


class TestRules:
    @pytest.fixture
    def mixed(self, tmp_path: Path) -> Path:
        path = tmp_path / "mixed.jsonl"
        lines = [json.dumps({"text": text}) for text in ("größe", "a", "größe", "", "longer", "größe ", "a")]
        path.write_text("\n".join([*lines[:2], "{", *lines[2:], '{"body": 1}']))
        return path

    @pytest.mark.parametrize(
        ("rules", "expected", "skipped"),
        [
            ({}, ["größe", "a", "größe", "longer", "größe ", "a"], {}),
            ({"min_length": 1}, ["größe", "a", "größe", "longer", "größe ", "a"], {}),
            ({"min_length": 5}, ["größe", "größe", "longer", "größe "], {"too short": 2}),
            ({"min_length": 6}, ["longer", "größe "], {"too short": 4}),
            ({"deduplicate": True}, ["größe", "a", "longer", "größe "], {"duplicate": 2}),
            (
                {"deduplicate": True, "min_length": 2},
                ["größe", "longer", "größe "],
                {"duplicate": 1, "too short": 2},
            ),
        ],
    )
    def test_what_is_left_out_is_counted_and_recorded(
        self, mixed: Path, tmp_path: Path, rules: dict, expected: list[str], skipped: dict[str, int]
    ) -> None:
        (tmp_path / "v.txt").write_text("held out")
        wanted = DocumentRules(on_error="skip", **rules)
        data = prepare([mixed], tmp_path / "data", validation=[tmp_path / "v.txt"], rules=wanted)
        assert read_back(data, "train") == expected
        always = {"empty": 1, "invalid JSON": 1, "without the text field": 1}
        assert data.info.skipped == dict(sorted({**always, **skipped}.items()))
        recorded = json.loads((tmp_path / "data" / "dataset.json").read_text())["rules"]
        assert recorded == {**DocumentRules().model_dump(), **rules, "on_error": "skip"}
        digests = [hashlib.sha256(text.encode()).digest() for text in [*expected, "held out"]]
        assert data.info.corpus_sha256 == hashlib.sha256(b"".join(digests)).hexdigest()

    def test_duplicates_are_found_across_sources_and_kept_out_of_validation(self, tmp_path: Path) -> None:
        for name, words in {"a": "one two", "b": "two three one", "v": "three four"}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(words.split()))
        sources = [tmp_path / "b.json", tmp_path / "a.json"]
        rules = DocumentRules(deduplicate=True)
        data = prepare(sources, tmp_path / "data", validation=[tmp_path / "v.json"], rules=rules)
        assert read_back(data, "train") == ["two", "three", "one"]
        assert read_back(data, "validation") == ["four"]
        assert data.info.skipped == {"duplicate": 3}

    @pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
    def test_removing_duplicates_is_as_if_they_had_never_been(self, tmp_path: Path, tokenizer: str) -> None:
        twice = [text for text in TEXTS for _ in range(2)]
        (tmp_path / "once.json").write_text(json.dumps(TEXTS))
        (tmp_path / "twice.json").write_text(json.dumps(twice))
        prepare([tmp_path / "once.json"], tmp_path / "one", tokenizer=tokenizer)
        rules = DocumentRules(deduplicate=True)
        prepare([tmp_path / "twice.json"], tmp_path / "two", tokenizer=tokenizer, rules=rules)
        one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
        del one["dataset.json"], two["dataset.json"]
        assert one == two

    def test_broken_documents_stop_by_default_and_leave_nothing(self, mixed: Path, tmp_path: Path) -> None:
        with pytest.raises(TokenFormerError, match=r"mixed\.jsonl:3: invalid JSON at column"):
            prepare([mixed], tmp_path / "data")
        assert [path.name for path in tmp_path.iterdir()] == ["mixed.jsonl"]

    def test_where_nothing_is_left_the_reasons_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{\n')
        rules = DocumentRules(min_length=3, on_error="skip")
        with pytest.raises(TokenFormerError, match=r"an empty corpus.*skipped: 1 invalid JSON, 1 too short"):
            prepare([tmp_path / "a.jsonl"], tmp_path / "data", rules=rules)

    def test_directories_of_before_the_rules_are_opened(self, corpus: Path, tmp_path: Path) -> None:
        prepare([corpus], tmp_path / "data")
        info = json.loads((tmp_path / "data" / "dataset.json").read_text())
        del info["rules"]
        (tmp_path / "data" / "dataset.json").write_text(json.dumps(info))
        assert DataDirectory.open(tmp_path / "data").info.rules == DocumentRules()


def test_a_large_vocabulary_is_stored_wider(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    file = tmp_path / "wide.json"
    prepare([tmp_path / "a.txt"], tmp_path / "narrow")
    definition = json.loads((tmp_path / "narrow" / "tokenizer.json").read_text())
    definition["model"]["vocab"] |= {f"unused{i}": i for i in range(257, 70_000)}
    file.write_text(json.dumps(definition))
    data = prepare([tmp_path / "a.txt"], tmp_path / "data", tokenizer=file)
    assert data.info.dtype == "int32"
    assert data.info.padded_vocab_size == 70_016
    assert data.split("train").dtype == np.int32
    assert (tmp_path / "data" / "train.idx").read_bytes()[17] == 4  # the format's code of int32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "bpe:many"}, "tokenizer: found 'bpe:many', expected bpe:N with N at least 257"),
        ({"tokenizer": "bpe:100"}, "tokenizer: found 'bpe:100', expected bpe:N"),
        ({"tokenizer": "bpe"}, "tokenizer: found 'bpe', expected bpe:N"),
        ({"tokenizer": "bites"}, "tokenizer: found 'bites', expected byte, bpe:N, the path"),
        ({"validation_fraction": 0.0}, "validation_fraction: found 0.0, expected a number between 0 and 1"),
        ({"validation_fraction": 1.0}, "validation_fraction: found 1.0"),
        ({"validation_fraction": float("nan")}, "validation_fraction: found nan"),
        ({"text_field": "body"}, r"corpus\.jsonl:1: no field 'body'; found text"),
        ({"validation": ["/nowhere"]}, "/nowhere: no such file"),
    ],
)
def test_wrong_options_leave_nothing_behind(
    corpus: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(TokenFormerError, match=message):
        prepare([corpus], tmp_path / "out" / "data", **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize("name", ["empty.txt", "folder", "blank.jsonl"])
def test_an_empty_corpus_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.bin").write_bytes(b"\0")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(TokenFormerError, match=rf"{name}: an empty corpus: found no text"):
        prepare([tmp_path / name], tmp_path / "data")
    assert not (tmp_path / "data").exists()
    (tmp_path / "full.txt").write_text("text\ntext\n")
    with pytest.raises(TokenFormerError, match=rf"{name}: an empty corpus"):
        prepare([tmp_path / "full.txt"], tmp_path / "data", validation=[tmp_path / name])


def test_an_output_with_content_is_refused_and_untouched(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    with pytest.raises(TokenFormerError, match="data: a directory with content is already there"):
        prepare([corpus], tmp_path / "data")
    assert files_of(tmp_path / "data") == {"mine.txt": b"mine"}


def test_a_failure_while_writing_keeps_what_is_done(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "write_json", full)
        message = (
            r"data: could not be written \(No space left on device\); 1 finished block kept in .*/\.data"
        )
        with pytest.raises(TokenFormerError, match=message):
            prepare([corpus], tmp_path / "data")
    assert not (tmp_path / "data").exists()
    prepare([corpus], tmp_path / "data")
    prepare([corpus], tmp_path / "other")
    assert files_of(tmp_path / "data") == files_of(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "data", "other"]


def test_sources_that_change_while_they_are_read_are_noticed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    survey = prepare_module.survey

    def survey_then_grow(*arguments):  # type: ignore[no-untyped-def]
        found = survey(*arguments)
        with corpus.open("a") as file:
            file.write('{"text": "late"}\n')
        return found

    monkeypatch.setattr(prepare_module, "survey", survey_then_grow)
    with pytest.raises(TokenFormerError, match="sources: changed while they were read"):
        prepare([corpus], tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


class TestOpening:
    @pytest.fixture
    def data(self, corpus: Path, tmp_path: Path) -> Path:
        prepare([corpus], tmp_path / "data")
        return tmp_path / "data"

    def refused(self, path: Path, message: str) -> None:
        with pytest.raises(TokenFormerError, match=message):
            DataDirectory.open(path)

    def test_another_tokenizer(self, data: Path, corpus: Path, tmp_path: Path) -> None:
        prepare([corpus], tmp_path / "other", tokenizer="bpe:300")
        load_tokenizer(tmp_path / "other").save(data)
        self.refused(data, r"tokenizer\.json: has hash .*: not the tokenizer that made these tokens")

    def test_missing_and_truncated_files(self, data: Path, tmp_path: Path) -> None:
        content = (data / "train.bin").read_bytes()
        (data / "train.bin").write_bytes(content[:-3])
        self.refused(data, rf"train\.bin: truncated: found {len(content) - 3} bytes, expected {len(content)}")
        (data / "train.bin").unlink()
        self.refused(data, r"train\.bin: cannot be read")
        (data / "tokenizer.json").unlink()
        self.refused(data, r"tokenizer\.json: no such file")
        (data / "dataset.json").unlink()
        self.refused(data, r"dataset\.json: no such file; expected the description of a data directory")
        self.refused(tmp_path / "nowhere", "nowhere: no such directory; expected a data directory")

    def test_stores_of_other_data(self, data: Path) -> None:
        for suffix in ("bin", "idx"):
            (data / f"train.{suffix}").write_bytes((data / f"validation.{suffix}").read_bytes())
        self.refused(
            data, r"train\.idx: holds \d+ documents and \d+ tokens, expected \d+ and \d+ \(dataset\.json\)"
        )

    def test_wrong_descriptions(self, data: Path) -> None:
        info = json.loads((data / "dataset.json").read_text())
        for change, message in (
            ({"format_version": 2}, "format_version: found 2"),
            ({"dtpye": "x"}, "dtpye: unknown field; did you mean 'dtype'"),
            ({"splits": {"../train": info["splits"]["train"]}}, "splits"),
        ):
            (data / "dataset.json").write_text(json.dumps(info | change))
            self.refused(data, rf"dataset\.json: {message}")

    def test_an_unknown_split(self, data: Path) -> None:
        with pytest.raises(TokenFormerError, match="no split 'test'; found train, validation"):
            DataDirectory.open(data).split("test")
