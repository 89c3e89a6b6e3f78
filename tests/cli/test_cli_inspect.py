"""``tokenformer inspect`` as users run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tokenformer.language.prepare import prepare
from tokenformer.language.tokenizers import ByteTokenizer
from tokenformer.models.directory import save_model
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TokenFormerConfig(
        vocab_size=384,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        qkv_param_tokens=8,
        proj_param_tokens=8,
        ffn_param_tokens=16,
    )
    directory = tmp_path_factory.mktemp("inspect") / "model"
    return save_model(build_model(config), directory, tokenizer=ByteTokenizer())


def test_tables_of_a_model_are_plain_when_piped(run_command, model: Path) -> None:
    done = run_command("inspect", model)
    assert (done.code, done.err) == (0, "")
    assert done.out.isascii()
    assert "\x1b" not in done.out
    lines = [line.split() for line in done.out.splitlines()]
    assert ["embedding", "6,144", "66.4", "%"] in lines
    assert ["total", "9,248"] in lines
    assert ["agree", "with", "config.json", "yes"] in lines


def test_json(run_command, model: Path) -> None:
    done = run_command("inspect", model, "--json")
    facts = json.loads(done.out)
    assert (facts["kind"], facts["path"]) == ("model", str(model))
    assert facts["parameters"]["total"] == sum(facts["parameters"]["by_part"].values())


def test_a_data_directory(run_command, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some [red]text[/red] here\n" * 50)
    prepare([tmp_path / "text.txt"], tmp_path / "data")
    done = run_command("inspect", tmp_path / "data")
    assert done.code == 0
    assert "some [red]text[/red] here" in done.out


def test_wrong_input(run_command, tmp_path: Path) -> None:
    done = run_command("inspect", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "expected a model directory (config.json), a run directory" in done.err
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    done = run_command("inspect", tmp_path)
    assert done.code == 2
    assert "'gpt2' is not a known architecture" in done.err


def test_inspection_does_not_import_torch(model: Path) -> None:
    script = (
        "import sys; sys.argv = ['tokenformer', 'inspect', sys.argv[1]]\n"
        "from tokenformer.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(model)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
