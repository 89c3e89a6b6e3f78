"""Tokenizers by the name of a repository, from a hub that is stood in for."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from tokenformer.errors import TokenFormerError
from tokenformer.language.hub_tokenizers import fetch_tokenizer, is_hub_tokenizer
from tokenformer.language.prepare import prepare
from tokenformer.language.tokenizers import train_bpe

TEXT = "the quick brown fox jumps over the lazy dog\n" * 20


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of repositories, ``owner/name/revision/file``."""
    root = tmp_path / "hub"

    def hf_hub_download(repository: str, filename: str, *, revision: str | None = None) -> str:
        folder = root / repository / (revision or "main")
        if not folder.is_dir():
            raise OSError("404 Client Error. Repository Not Found")
        if not (folder / filename).is_file():
            raise EntryNotFoundError(f"404 Client Error. {filename} not found")
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    for revision in ("main", "v2"):
        (root / "owner" / "name" / revision).mkdir(parents=True)
        train_bpe([TEXT + revision], 280).save(root / "owner" / "name" / revision)
    return root


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:gpt2", True), ("EleutherAI/gpt-neox-20b", True), ("owner/name@v1.0", True), ("hf:a/b@refs/pr/1", True),
        ("byte", False), ("bpe:100", False), ("a/b/tokenizer.json", False), ("/a/b", False), ("./a", False),
        ("../a", False), ("bites", False),
    ],
)  # fmt: skip
def test_what_names_a_repository(name: str, expected: bool) -> None:
    assert is_hub_tokenizer(name) is expected


@pytest.mark.parametrize("name", ["hf:owner/name", "owner/name", "owner/name@v2"])
def test_data_is_prepared_with_it(hub: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    data = prepare([tmp_path / "a.txt"], tmp_path / "data", tokenizer=name)
    folder = hub / "owner" / "name" / ("v2" if "@" in name else "main")
    local = prepare([tmp_path / "a.txt"], tmp_path / "local", tokenizer=folder)
    assert data.info.tokenizer == name
    assert data.info.tokenizer_sha256 == local.info.tokenizer_sha256
    assert (tmp_path / "data" / "train.bin").read_bytes() == (tmp_path / "local" / "train.bin").read_bytes()


def test_the_end_token_that_its_configuration_names(hub: Path) -> None:
    folder = hub / "owner" / "name" / "main"
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": 280, "content": "<end>"})
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    assert fetch_tokenizer("owner/name").eos_token == "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert fetch_tokenizer("owner/name").eos_token == "<end>"
    assert fetch_tokenizer("owner/name", eos_token="<|endoftext|>").eos_token == "<|endoftext|>"


def test_what_is_not_there_is_named(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenFormerError, match=r"hf:nobody/x cannot be fetched .*OSError: 404.*local-dir"):
        fetch_tokenizer("hf:nobody/x")
    with pytest.raises(TokenFormerError, match="nobody/x is no file or folder here and cannot be fetched"):
        fetch_tokenizer("nobody/x")
    (hub / "owner" / "name" / "main" / "tokenizer.json").unlink()
    with pytest.raises(
        TokenFormerError, match=r"owner/name has no tokenizer\.json; turn it into one with transf"
    ):
        fetch_tokenizer("owner/name")


def test_without_the_hub_the_local_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(
        TokenFormerError,
        match=r"tokenizer: hf:nobody/nothing cannot be fetched from the Hugging Face hub.*'hf download "
        r"nobody/nothing tokenizer\.json tokenizer_config\.json --local-dir DIR', and give DIR",
    ):
        prepare([tmp_path / "a.txt"], tmp_path / "data", tokenizer="hf:nobody/nothing")
    assert not (tmp_path / "data").exists()
