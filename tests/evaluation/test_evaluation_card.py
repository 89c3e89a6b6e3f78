"""Evaluations in model cards: added to, never overwritten."""

import json
from pathlib import Path

import pytest

from tokenformer.adapters.directory import save_adapter
from tokenformer.errors import TokenFormerError
from tokenformer.evaluation.card import CardRow, add_to_card, card_of
from tokenformer.growth.grow import grow_model
from tokenformer.growth.spec import GrowthSpec
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.prepare import prepare
from tokenformer.models.card import model_card
from tokenformer.models.directory import load_model, save_model

ROW = CardRow("2026-01-02", "`piqa`, version 1.0", "acc", "0.5 ± 0.1", "lm-evaluation-harness 0.4")


@pytest.fixture
def data(tmp_path: Path) -> DataDirectory:
    (tmp_path / "text.txt").write_text("one two three\n" * 60)
    return prepare([tmp_path / "text.txt"], tmp_path / "data")


@pytest.fixture
def model(tmp_path: Path, make_tokenformer, data: DataDirectory) -> Path:
    return save_model(make_tokenformer(vocab_size=384), tmp_path / "model", tokenizer=data.tokenizer)


def section(card: Path) -> list[str]:
    return card.read_text().split("## Evaluations\n")[1].splitlines()


def test_evaluations_are_added_to_what_is_there(model: Path, data: DataDirectory, run_command) -> None:
    card = model / "README.md"
    before = card.read_text()
    plain = run_command("evaluate", model, "--data", data.path)
    assert (plain.code, card.read_text()) == (0, before)

    assert run_command("evaluate", model, "--data", data.path, "--update-card").code == 0
    once = card.read_text()
    assert once.startswith(before)
    assert [line.split(" | ")[2] for line in section(card)[3:]] == ["loss", "perplexity", "bits per byte"]

    assert run_command("evaluate", model, "--data", data.path, "--update-card").code == 0
    assert card.read_text() == once  # the same once more is no news
    options = ("--stride", 5, "--word-perplexity")
    assert run_command("evaluate", model, "--data", data.path, "--update-card", *options).code == 0
    assert card.read_text().startswith(once)
    assert "stride 5" in section(card)[-1]
    assert "perplexity per word" in section(card)[-1]
    load_model(model)


def test_tasks_are_recorded_with_their_versions(
    model: Path, tmp_path: Path, run_command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    passages = tmp_path / "passages.jsonl"
    passages.write_text("".join(json.dumps({"text": f"one two {word}"}) + "\n" for word in ("three", "four")))
    task = f"lambada_jsonl={passages}"
    done = run_command("evaluate", model, "--tasks", task, "--device", "cpu", "--update-card")
    assert done.code == 0, done.err
    rows = section(model / "README.md")[3:]
    assert len(rows) == 2
    assert all("`lambada_jsonl`, version 1.0" in row and "2 documents" in row for row in rows)
    assert all("lm-evaluation-harness 0." in row and "float32" in row for row in rows)


def test_text_around_the_section_stays(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# Mine\n\n| a | b |\n| - | - |\n\n## Evaluations\n\nBy hand.\n\n## More\n\n| c | d |\n")
    add_to_card(card, [ROW])
    add_to_card(card, [ROW, ROW._replace(date="2027-01-01"), ROW._replace(value="0.6 | 7")])
    text = card.read_text()
    assert text.startswith("# Mine\n\n| a | b |\n| - | - |\n\n## Evaluations\n")
    assert text.endswith("By hand.\n\n## More\n\n| c | d |\n")
    assert text.count("`piqa`") == 2
    assert "0.6 \\| 7" in text


def test_a_directory_without_a_card_gets_one(model: Path) -> None:
    card = model / "README.md"
    card.unlink()
    add_to_card(card, [ROW])
    assert card.read_text().startswith(model_card(load_model(model).config))
    assert ROW.line() in card.read_text()


def test_with_an_adapter_the_card_is_the_adapter_s(
    model: Path, data: DataDirectory, tmp_path: Path, run_command
) -> None:
    grown = grow_model(load_model(model), GrowthSpec(ffn=16), seed=0).model
    adapter = tmp_path / "adapter"
    save_adapter(grown, adapter, base=model)
    before = (model / "README.md").read_text()
    done = run_command("evaluate", model, "--adapter", adapter, "--data", data.path, "--update-card")
    assert done.code == 0, done.err
    assert len(section(adapter / "README.md")) == 6
    assert (model / "README.md").read_text() == before
    (adapter / "README.md").unlink()
    add_to_card(adapter / "README.md", [ROW])
    assert ROW.line() in section(adapter / "README.md")
    with pytest.raises(TokenFormerError, match="found 2 adapters, expected one at most"):
        card_of(model, [adapter, adapter])
