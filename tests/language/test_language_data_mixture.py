"""Several data directories as one source."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenformer.errors import TokenFormerError
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.data_mixture import DataMixture
from tokenformer.language.prepare import prepare


def make(folder: Path, name: str, tokenizer: str = "byte") -> DataDirectory:
    text = folder / "text.txt"
    text.write_text("\n".join(f"{i} and {i * i} make {i + i * i}" for i in range(200)))
    return prepare([text], folder / name, tokenizer=tokenizer)


def test_components_are_named_after_their_directories(tmp_path: Path) -> None:
    one, two, three = (make(tmp_path, name) for name in ("web", "code", "old/web"))
    assert [part.name for part in DataMixture([(one, 1), (two, 2)]).components] == ["web", "code"]
    names = [part.name for part in DataMixture([(one, 1), (three, 2)]).components]
    assert names == [f"{tmp_path.name}/web", "old/web"]
    assert DataMixture([(one, 3), (two, 1)]).shares == [0.75, 0.25]
    alone = DataMixture.of(one)
    assert alone.shares == [1.0]
    assert DataMixture.of(alone) is alone


def test_other_tokenizers_are_refused_with_both_names(tmp_path: Path) -> None:
    parts = [(make(tmp_path, "bytes"), 1.0), (make(tmp_path, "pairs", "bpe:300"), 1.0)]
    with pytest.raises(TokenFormerError, match=r"pairs: its tokenizer \(.*is not that of .*bytes \("):
        DataMixture(parts)


def test_mixtures_that_cannot_be(tmp_path: Path) -> None:
    data = make(tmp_path, "web")
    with pytest.raises(TokenFormerError, match="is empty"):
        DataMixture([])
    with pytest.raises(TokenFormerError, match="web comes twice"):
        DataMixture([(data, 1), (data, 2)])
    with pytest.raises(TokenFormerError, match="web: weight 0, expected a number above 0"):
        DataMixture([(data, 0)])
