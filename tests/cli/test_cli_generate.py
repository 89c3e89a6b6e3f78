"""``tokenformer generate`` as users run it."""

import re
from pathlib import Path

import pytest

from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.engine import generate
from tokenformer.language.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from tokenformer.models.directory import load_model, save_model
from tokenformer.models.quantize import quantize_model
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig

CONTEXT = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TokenFormerConfig(
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        qkv_param_tokens=24,
        proj_param_tokens=16,
        ffn_param_tokens=40,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    directory = tmp_path_factory.mktemp("generate") / "model"
    return save_model(build_model(config, seed=2), directory, tokenizer=ByteTokenizer())


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(model)


def continuation(model: Path, tokenizer: Tokenizer, prompt: str, new: int, sampling: SamplingConfig) -> str:
    ids = generate(
        load_model(model),
        [tokenizer.encode(prompt)],
        max_new_tokens=new,
        sampling=sampling,
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=tokenizer.vocab_size,
    )
    return tokenizer.decode(ids[0])


def test_one_prompt_is_followed_by_what_python_gives(run_command, model: Path, tokenizer: Tokenizer) -> None:
    done = run_command("generate", model, "--prompt", "Größe ", "--max-new-tokens", 20, "--temperature", 0)
    expected = continuation(model, tokenizer, "Größe ", 20, SamplingConfig(temperature=0))
    assert done == (0, f"Größe {expected}\n", "")


def test_sampling_options_reach_the_sampler(run_command, model: Path, tokenizer: Tokenizer) -> None:
    options = {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 11}
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = run_command("generate", model, "--prompt", "ab", "--max-new-tokens", 25, *arguments)
    expected = continuation(model, tokenizer, "ab", 25, SamplingConfig(**options))
    assert done.out == f"ab{expected}\n"


def test_several_prompts_come_one_after_another(
    run_command, model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text("third\nprompt")
    arguments = ["--prompt", "one", "--prompt", "the second", "--prompt-file", tmp_path / "prompt.txt"]
    done = run_command("generate", model, *arguments, "--max-new-tokens", 10, "--seed", 5)
    expected = ""
    for number, prompt in enumerate(["one", "the second", "third\nprompt"]):
        text = continuation(model, tokenizer, prompt, 10, SamplingConfig(seed=5 + number))
        expected += f"--- {number + 1} of 3 ---\n{prompt}{text}\n"
    assert done == (0, expected, "")


def test_an_empty_prompt_starts_a_document(run_command, model: Path) -> None:
    done = run_command("generate", model, "--prompt", "", "--max-new-tokens", 8)
    assert done.code == 0
    assert done.out.endswith("\n")


def test_a_run_directory_stands_for_its_model(run_command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(model)
    arguments = ["--prompt", "x", "--max-new-tokens", 5]
    in_run = run_command("generate", tmp_path / "run", *arguments)
    assert in_run == run_command("generate", model, *arguments)
    assert in_run.code == 0


def test_the_end_of_the_context_is_announced(run_command, model: Path) -> None:
    done = run_command("generate", model, "--prompt", "a" * 60, "--max-new-tokens", 10)
    assert done.code == 0
    assert (
        done.err == "note: prompt 1: at most 4 new tokens: with its 60 they fill the model's context of 64\n"
    )


def test_a_device_that_is_not_there_is_all_that_is_said(run_command, model: Path) -> None:
    done = run_command("generate", model, "--prompt", "a" * 60, "--device", "cuda:99")
    assert (done.code, done.out) == (2, "")
    assert "note:" not in done.err


def test_a_prompt_longer_than_the_context(run_command, model: Path, tokenizer: Tokenizer) -> None:
    prompt = "abcdefghij" * 8
    refused = run_command("generate", model, "--prompt", prompt, "--max-new-tokens", 10)
    assert (refused.code, refused.out) == (2, "")
    assert "80 tokens" in refused.err
    assert "context is 64" in refused.err
    assert "--truncate-prompt" in refused.err
    cut = run_command(
        "generate", model, "--prompt", prompt, "--max-new-tokens", 10, "--truncate-prompt", "--temperature", 0
    )
    assert cut.code == 0
    assert cut.err == "note: prompt 1: only its last 54 of 80 tokens are read\n"
    expected = continuation(model, tokenizer, prompt[-54:], 10, SamplingConfig(temperature=0))
    assert cut.out == f"{prompt}{expected}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-k", "0"], "top_k"),
        (["--top-p", "1.5"], "top_p"),
        (["--min-p", "0"], "min_p"),
        (["--seed", "-3"], "seed"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "abacus"], "abacus"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_wrong_options(run_command, model: Path, arguments: list[str], message: str) -> None:
    done = run_command("generate", model, "--prompt", "x", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in re.sub(r"\x1b\[[0-9;]*m", "", done.err)
    assert "Traceback" not in done.err


def test_wrong_inputs(run_command, model: Path, tmp_path: Path) -> None:
    assert "expected --prompt TEXT" in run_command("generate", model).err
    missing = run_command("generate", tmp_path / "absent", "--prompt", "x")
    assert (missing.code, missing.out) == (2, "")
    assert "absent: no such directory" in missing.err
    no_file = run_command("generate", model, "--prompt-file", tmp_path / "absent.txt")
    assert no_file.code == 2
    assert "absent.txt: no such file" in no_file.err
    bare = save_model(load_model(model), tmp_path / "bare")
    no_tokenizer = run_command("generate", bare, "--prompt", "x")
    assert no_tokenizer.code == 2
    assert "tokenizer.json: no such file" in no_tokenizer.err


def test_terminal_output_holds_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenformer.cli import generate as command

    text = "a\x1b[2Jb\x07\tc\n\x9bd\x7f"
    assert command._shown(text) == text  # not a terminal: as it is
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert command._shown(text) == "a\ufffd[2Jb\ufffd\tc\n\ufffdd\ufffd"


def test_weights_in_another_dtype_or_in_8_bits(run_command, model: Path, tokenizer: Tokenizer) -> None:
    greedy = SamplingConfig(temperature=0)
    for options, change in (
        (("--dtype", "bfloat16"), lambda loaded: loaded.bfloat16()),
        (("--quantize", "int8"), quantize_model),
    ):
        loaded = load_model(model)
        change(loaded)
        ids = generate(
            loaded,
            [tokenizer.encode("ab")],
            max_new_tokens=12,
            sampling=greedy,
            eos_token_id=tokenizer.eos_token_id,
            vocab_size=tokenizer.vocab_size,
        )
        done = run_command(
            "generate", model, "--prompt", "ab", "--max-new-tokens", 12, "--temperature", 0, *options
        )
        assert done == (0, f"ab{tokenizer.decode(ids[0])}\n", "")
    wrong = run_command("generate", model, "--prompt", "ab", "--quantize", "int3")
    assert wrong.code == 2
    assert "int8" in wrong.err
