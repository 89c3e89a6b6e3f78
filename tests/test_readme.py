"""Everything that README.md tells people to type works: the commands in order, the Python, the links."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tokenformer.interop.gpt_neox import native_to_gpt_neox
from tokenformer.interop.official import tensor_map
from tokenformer.interop.official_config import OfficialConfig
from tokenformer.language.tokenizers import ByteTokenizer
from tokenformer.models.directory import save_model
from tokenformer.models.registry import build_model
from tokenformer.models.transformer.config import TransformerConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

# Recipes are run as they are but for these sizes.
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "sequence_length": 32,
    "batch_tokens": 64,
    "max_tokens": 128,
    "every_steps": 2,
    "steps": 3,
    "tokens": 192,
}
DIVIDED = {"qkv_param_tokens", "proj_param_tokens", "ffn_param_tokens", "qkv", "proj", "ffn"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """The lines of all bash blocks that call ``program``, as its arguments."""
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0] == program]


def smaller(value: Any) -> Any:
    """A recipe with sizes of a test, all else as it was."""
    if isinstance(value, list):
        return [smaller(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: SIZES[name]
        if name in SIZES and isinstance(inner, int)
        else inner // 16
        if name in DIVIDED and isinstance(inner, int)
        else smaller(inner)
        for name, inner in value.items()
    }


def write_texts() -> None:
    Path("notes").mkdir()
    for index in range(60):
        lines = [f"Note {index}, line {line}: {index * line} is {index} times {line}." for line in range(12)]
        Path(f"notes/note{index}.txt").write_text("\n".join(lines))
    Path("book.txt").write_text(
        "\n".join(f"Once upon a time there were {count} frogs." for count in range(99))
    )


def write_recipes() -> None:
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        target = Path("recipes") / recipe.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(yaml.safe_dump(smaller(yaml.safe_load(recipe.read_text("utf-8"))), sort_keys=False))


def write_official_checkpoint(directory: Path, yaml_file: Path) -> None:
    config: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "qkv_slot_num": 4,
        "proj_slot_num": 4,
        "ffn_slot_num": 6,
        "seq_length": 16,
        "rotary_pct": 0.5,
        "norm_activation_type": "l2_norm_gelu",
    }
    neox = {"pos_emb": "rotary", "norm": "layernorm_nonparam"}
    yaml_file.parent.mkdir(parents=True)
    yaml_file.write_text(json.dumps(config | neox))
    directory.mkdir()
    official = OfficialConfig(**config, padded_vocab_size=384, layernorm_epsilon=1e-5, tied=True)
    weights = {key: torch.zeros(ours.shape) for key, ours in tensor_map(official).items()}
    torch.save(weights, directory / "pytorch_model.bin")
    ByteTokenizer().save(directory)


def write_gpt_neox(directory: Path) -> None:
    sizes = {"vocab_size": 384, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build_model(TransformerConfig(**sizes, use_bias=True, use_parallel_residual=True))
    native_to_gpt_neox(save_model(model, directory.with_name("transformer")), directory)


def test_every_line_of_a_bash_block_is_tried_here() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(lines) == len(commands("tokenformer")) + len(commands("make"))
    assert len(commands("tokenformer")) >= 10


def test_the_commands_work_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts()
    write_recipes()
    write_official_checkpoint(Path("TokenFormer-150M"), Path("configs/tokenformer/150M_eval.yml"))
    write_gpt_neox(Path("pythia-160m"))
    for arguments in commands("tokenformer"):
        done = run_command(*arguments)
        assert done.code == 0, f"tokenformer {shlex.join(arguments)}\n{done.out}\n{done.err}"
        assert "WARNING" not in done.err
    for written in ("runs/larger/report.html", "reports/mine/report.html", "models/150m/config.json"):
        assert Path(written).is_file()
    ladder = json.loads(Path("runs/ladder/model/config.json").read_text())
    assert [step["init"] for step in ladder["growth_history"]] == ["exact", "exact"]


def test_growing_a_checkpoint_instead_keeps_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., Any]
) -> None:
    """``recipes/continue.yaml`` names the commands in its comment."""
    monkeypatch.chdir(tmp_path)
    write_texts()
    write_recipes()
    assert run_command("prepare", "book.txt", "--out", "data/mine").code == 0
    assert run_command("train", "recipes/small.yaml", "--out", "runs/mine").code == 0
    (checkpoint,) = [path for path in Path("runs/mine/checkpoints").iterdir() if path.name.endswith("3")]
    assert run_command("grow", checkpoint, "--out", "grown", "--factor", "3.5").code == 0
    done = run_command("train", "recipes/continue.yaml", "init_from=grown", "data.path=data/mine")
    assert done.code == 0, done.err
    assert "runs/continue: starts at step 3" in done.out


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not there")
def test_make_targets_exist() -> None:
    targets = [target for line in commands("make") for target in line]
    assert {"quickstart", "test"} <= set(targets)
    documented = re.findall(r"`make ([a-z-]+)`", "".join((ROOT / page).read_text("utf-8") for page in PAGES))
    for target in {*targets, *documented}:
        planned = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert planned.returncode == 0, planned.stderr
        assert planned.stdout.strip()


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_works_as_written(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 384, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_model(build_model(TransformerConfig(**sizes)), Path("models/150m"), tokenizer=ByteTokenizer())
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    missing = []
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def anchors(page: Path) -> set[str]:
    """Headings as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ +(.+)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
