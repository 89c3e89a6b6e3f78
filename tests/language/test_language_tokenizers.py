"""Tokenizers: round trips, agreement with Hugging Face, streaming."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenformer.errors import TokenFormerError
from tokenformer.language.pieces import LONG, pieces
from tokenformer.language.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

NEOX = Path(__file__).parents[3] / "shared" / "data" / "gpt-neox-20b-tokenizer.json"
needs_neox = pytest.mark.skipif(not NEOX.exists(), reason=f"{NEOX} is not there")

any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
with_specials = st.lists(
    st.one_of(
        any_text,
        st.sampled_from(["<|endoftext|>", "</s>", "  ", "\n\n", "def f(x):", "\u00e9", "\U0001f600"]),
    )
).map("".join)

TRAINING = [
    "def add(a, b):\n    return a + b\n",
    "the cat and the hat and the bat " * 5,
    "naïve café 😀 <|endoftext|>",
]


@cache
def bpe() -> Tokenizer:
    return train_bpe(TRAINING, 300)


@cache
def neox() -> Tokenizer:
    return load_tokenizer(NEOX)


@cache
def neox_backend() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(NEOX))


@cache
def sentencepiece_like() -> Tokenizer:
    """No byte-level decoder: words with a metaspace, characters by byte fallback, ``</s>`` at the end."""
    vocab = {"</s>": 0, "<pad>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    for piece in ("▁", "a", "b", "c", "ab", "▁ab"):
        vocab[piece] = len(vocab)
    model = tokenizers.models.BPE(
        vocab, [("a", "b"), ("▁", "ab")], byte_fallback=True, fuse_unk=True, unk_token="<pad>"
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    backend.add_special_tokens(["</s>", "<pad>"])
    return Tokenizer(backend.to_str())


ALL = [ByteTokenizer, bpe, pytest.param(neox, marks=needs_neox), sentencepiece_like]
EXACT = [ByteTokenizer, bpe, sentencepiece_like]  # GPT-NeoX's normalises to NFC


def test_byte_k_has_id_k_and_256_ends_a_document() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("Aé\0") == [65, 0xC3, 0xA9, 0]
    assert (tokenizer.eos_token_id, tokenizer.vocab_size, tokenizer.padded_vocab_size) == (256, 257, 384)
    assert tokenizer.decode([65, 256, 66, 300, 383]) == "AB"
    assert tokenizer.decode([65, 256, 66], skip_special=False) == "A<|endoftext|>B"


@given(with_specials)
def test_the_byte_tokenizer_file_gives_hugging_face_the_same_ids(text: str) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_file())
    backend.encode_special_tokens = True
    ids = ByteTokenizer().encode(text)
    assert backend.encode(text).ids == ids == list(text.encode())
    assert backend.decode(ids) == text


@cache
def byte_file() -> str:
    from tokenformer.language.byte_level import byte_tokenizer_definition

    return byte_tokenizer_definition()


@pytest.mark.parametrize("make", EXACT)
@settings(deadline=None)
@given(text=with_specials)
def test_any_text_comes_back_and_never_holds_special_ids(make, text: str) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    ids = tokenizer.encode(text)
    if tokenizer is sentencepiece_like():
        text = text.replace("▁", " ")  # what its normaliser takes away
    assert tokenizer.decode(ids) == text
    assert not set(ids) & tokenizer.special_ids
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    assert tokenizer.encode_batch([text, ""])[1].tolist() == []
    assert tokenizer.count_bytes(np.array([*ids, tokenizer.eos_token_id], dtype=np.int64)) == len(
        text.encode()
    )


@pytest.mark.parametrize("make", ALL)
def test_special_ids_come_from_text_only_when_asked(make) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    text = f"ab{tokenizer.eos_token}ab"
    assert tokenizer.eos_token_id not in tokenizer.encode(text)
    asked = tokenizer.encode(text, allow_special=True)
    assert asked.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(asked) == "abab"


@needs_neox
@settings(deadline=None)
@given(st.lists(st.integers(0, 50276), max_size=30))
def test_byte_level_decoding_agrees_with_hugging_face(ids: list[int]) -> None:
    backend = neox_backend()
    assert neox().decode(ids) == backend.decode(ids)
    assert neox().decode(ids, skip_special=False) == backend.decode(ids, skip_special_tokens=False)


@needs_neox
def test_the_gpt_neox_tokenizer() -> None:
    tokenizer = neox()
    assert (tokenizer.vocab_size, tokenizer.padded_vocab_size, tokenizer.eos_token_id) == (50277, 50304, 0)
    text = "Hello,      world: naïve 😀"
    assert tokenizer.encode(text) == neox_backend().encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.count_bytes(np.array(tokenizer.encode(text))) == len(text.encode())


@pytest.mark.parametrize("make", ALL)
@settings(deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(make, data) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    ids = tokenizer.encode(data.draw(with_specials))
    cut = data.draw(st.integers(0, len(ids)))
    if tokenizer is sentencepiece_like():  # byte fallback decodes a broken character otherwise
        cut = len(ids)
    stream = tokenizer.stream()
    pieces = [stream.add(id) for id in ids[:cut]]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in tokenizer.decode(ids[:cut])
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids[:cut])


def test_a_stream_never_emits_half_a_character() -> None:
    stream = ByteTokenizer().stream()
    assert [stream.add(id) for id in "é😀!".encode()] == ["", "é", "", "", "", "😀", "!"]
    assert stream.add(256) == ""
    assert stream.add(0xF0) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    generic = sentencepiece_like().stream()
    ids = sentencepiece_like().encode("ab 😀")
    assert "".join(generic.add(id) for id in ids) == "ab 😀"
    assert generic.finish() == ""


def test_incomplete_utf8_is_replaced() -> None:
    assert ByteTokenizer().decode([0x41, 0xC3]) == "A\ufffd"


def test_half_a_surrogate_pair_is_refused() -> None:
    for tokenizer in (ByteTokenizer(), bpe()):
        for allow_special in (False, True):
            with pytest.raises(TokenFormerError, match="half a surrogate pair at character 1"):
                tokenizer.encode("a\ud800", allow_special=allow_special)


def test_bpe_training_is_deterministic_across_processes() -> None:
    code = (
        "from tokenformer.language.tokenizers import train_bpe;"
        f"print(train_bpe(iter({TRAINING!r}), 300).sha256)"
    )
    for threads in ("1", "2"):
        command = [sys.executable, "-c", code]
        environment = {"RAYON_NUM_THREADS": threads, "PATH": ""}
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert found.stdout.strip() == bpe().sha256


def test_bpe_has_the_vocabulary_asked_for_and_learns() -> None:
    assert bpe().vocab_size == 300
    assert bpe().padded_vocab_size == 384
    assert bpe().eos_token == "<|endoftext|>"
    assert len(bpe().encode("the cat and the hat")) <= 7
    with pytest.raises(TokenFormerError, match="bpe:256: too small; expected at least 257"):
        train_bpe(TRAINING, 256)


@pytest.mark.parametrize("make", ALL)
def test_saved_and_loaded_is_the_same_tokenizer(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    tokenizer.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        assert loaded.sha256 == tokenizer.sha256
        assert loaded.encode("ab <|endoftext|>") == tokenizer.encode("ab <|endoftext|>")


def test_the_hash_is_of_the_content_not_of_its_layout(tmp_path: Path) -> None:
    definition = json.loads(byte_file())
    definition = dict(reversed(definition.items()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition, indent=7))
    assert load_tokenizer(tmp_path).sha256 == ByteTokenizer().sha256
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    assert bpe().sha256 != ByteTokenizer().sha256


def without_end_token() -> str:
    definition = json.loads(byte_file())
    definition["added_tokens"][0]["content"] = "[STOP]"
    return json.dumps(definition)


def test_the_end_token_can_be_named_and_is_remembered(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(without_end_token())
    with pytest.raises(
        TokenFormerError, match=r"mine\.json: no end-of-document token .* <\|endoftext\|> or </s>"
    ):
        load_tokenizer(file)
    with pytest.raises(TokenFormerError, match=r"mine\.json: no end-of-document token .* expected \[NO\]$"):
        load_tokenizer(file, eos_token="[NO]")
    tokenizer = load_tokenizer(file, eos_token="[STOP]")
    assert tokenizer.eos_token_id == 256
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_token == "[STOP]"


def test_an_end_token_in_hugging_face_s_long_form(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(without_end_token())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "[STOP]", "lstrip": false}}')
    assert load_tokenizer(tmp_path).eos_token == "[STOP]"


def test_lengths_that_a_file_asks_for_do_not_cut_documents() -> None:
    backend = tokenizers.Tokenizer.from_str(byte_file())
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    assert len(Tokenizer(backend.to_str()).encode("0123456789")) == 10


def test_files_that_are_no_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenFormerError, match=r"tokenizer\.json: no such file; expected a tokenizer"):
        load_tokenizer(tmp_path)
    for content in ("{", '{"a": 1}', "[]", "\0"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(TokenFormerError, match=r"tokenizer\.json: not a valid tokenizer\.json"):
            load_tokenizer(tmp_path)


@cache
def long_text() -> str:
    source = Path(tokenizers.__file__).parent / "__init__.pyi"
    text = source.read_text(encoding="utf-8") + "\n\n  \n   naïve 😀\nend 's 12 \n = Head = \n"
    return text * (1 + LONG // len(text))


@pytest.mark.parametrize("make", [bpe, pytest.param(neox, marks=needs_neox)])
def test_very_long_texts_are_encoded_as_if_whole(make) -> None:  # type: ignore[no-untyped-def]
    tokenizer, text = make(), long_text()
    assert len(list(pieces(text))) > 3
    assert "".join(pieces(text)) == text
    backend = tokenizers.Tokenizer.from_str(saved(tokenizer))
    short, long = tokenizer.encode_batch(["short", text])
    assert short.tolist() == backend.encode("short").ids
    assert long.tolist() == backend.encode(text).ids


def saved(tokenizer: Tokenizer) -> str:
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")


def test_texts_are_cut_only_where_words_end() -> None:
    for text in ("", "a\nb c" * (LONG // 5), "a" * (2 * LONG), "a  \n\n  b" * LONG, "\n" * (2 * LONG)):
        assert list(pieces(text)) == [text]
    for text, end, start in (("ab\n\ncd\n", "d\n", "ab"), ("ab  cd ef\n\n", "cd", " ef")):
        first, *others, last = pieces(text * LONG)
        assert len(others) > 10
        assert all(piece.endswith(end) for piece in (first, *others))
        assert all(piece.startswith(start) for piece in (*others, last))


def test_a_tokenizer_that_puts_something_before_a_text_takes_it_whole() -> None:
    backend = tokenizers.Tokenizer.from_str(byte_file())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    text = "ab\n" * (1 + LONG // 3)
    assert len(Tokenizer(backend.to_str()).encode_batch([text])[0]) == len(text) + 1


@pytest.mark.parametrize("make", [bpe, pytest.param(neox, marks=needs_neox)])
@given(left=with_specials, right=with_specials)
def test_a_text_cut_before_a_space(make, left: str, right: str) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    assert tokenizer.works_in_words
    if not left or left[-1].isspace() or not right or right[0].isspace():
        return
    for special in (False, True):
        parts = tokenizer.encode_batch([left, f" {right}", f"{left} {right}"], allow_special=special)
        assert [*parts[0], *parts[1]] == parts[2].tolist()


def test_tokenizers_that_join_words_are_known() -> None:
    def changed(change: Callable[[tokenizers.Tokenizer], object]) -> Tokenizer:
        backend = tokenizers.Tokenizer.from_str(byte_file())
        change(backend)
        return Tokenizer(backend.to_str())

    def whole(backend: tokenizers.Tokenizer) -> None:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def normal(backend: tokenizers.Tokenizer) -> None:
        backend.normalizer = tokenizers.normalizers.Replace(" b", "c")

    assert not changed(whole).works_in_words
    assert not changed(normal).works_in_words
    for token in (tokenizers.AddedToken("<x>", rstrip=True), tokenizers.AddedToken("new york")):
        assert not changed(lambda backend, token=token: backend.add_tokens([token])).works_in_words  # type: ignore[misc]
