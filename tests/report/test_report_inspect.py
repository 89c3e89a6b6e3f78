"""Inspection of real directories: what a short run over real data leaves on disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from tokenformer.errors import TokenFormerError
from tokenformer.language.prepare import prepare
from tokenformer.models.directory import load_model, save_model
from tokenformer.models.registry import build_model
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.report.inspect import inspect_path
from tokenformer.report.tables import Table, byte_size, count
from tokenformer.train.config import load_run_config
from tokenformer.train.run import train

RECIPE = """
model: {{architecture: tokenformer, vocab_size: 384, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
         qkv_param_tokens: 12, proj_param_tokens: 16, ffn_param_tokens: 20, max_position_embeddings: 40}}
data: {{path: {data}, sequence_length: 32, batch_tokens: 128}}
logging: {{every_steps: 1, tensorboard: false}}
stages:
- {{name: small, steps: 3}}
- {{name: large, steps: 2, grow: {{factor: 2.0}}}}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data/`` and ``run/`` with two stages."""
    work = tmp_path_factory.mktemp("inspect")
    texts = [f"[bold]Text[/bold] number {i},\n\tone of many; größer.\x1b[31m " * 5 for i in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (work / "text.jsonl").write_text(lines)
    prepare([work / "text.jsonl"], work / "data", validation_fraction=0.25)
    (work / "recipe.yaml").write_text(RECIPE.format(data=work / "data"))
    train(load_run_config(work / "recipe.yaml"), work / "run", quiet=True)
    return work


def table(tables: list[Table], title: str) -> dict[str, tuple[str, ...]]:
    """Rows of the table whose title begins so, by their first cell."""
    found = next(table for table in tables if table.title.startswith(title))
    return {row[0]: row[1:] for row in found.rows}


def test_a_model_directory(work: Path) -> None:
    directory = work / "run" / "model"
    facts, tables = inspect_path(directory)
    model = load_model(directory)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    assert facts["kind"] == "model"
    assert facts["parameters"]["total"] == total
    assert facts["parameters"]["by_part"] == {
        part: sum(size for name, size in sizes.items() if marker in name)
        for part, marker in (
            ("embedding", "embedding"),
            ("attention", ".attention."),
            ("ffn", ".ffn."),
            ("norm", "norm"),
        )
    }
    assert facts["groups"] == {"qkv": [12, 12], "proj": [16, 16], "ffn": [20, 20]}
    assert facts["tau"] == {"qkv": 12, "proj": 16, "ffn": 20}
    assert [stage["init"] for stage in facts["growth"]] == [None, "exact"]
    assert [stage["step"] for stage in facts["growth"]] == [0, 3]
    per_token = 2 * 32 * 2
    first = per_token * (3 * 12 + 16 + 20) + 384 * 32 + 2 * 32
    assert [stage["parameters"] for stage in facts["growth"]] == [first, total]
    assert facts["memory_bytes"] == {
        "weights_float32": 4 * total,
        "weights_bfloat16": 2 * total,
    }
    products = total - 2 * 32  # the tied embedding is the head; the final norm is no product
    assert facts["flops_per_token"]["training"] == 6 * products + 6 * 2 * 32 * 41
    assert facts["flops_per_token"]["forward"] == facts["flops_per_token"]["training"] / 3
    assert facts["weights"]["parameters"] == total
    assert facts["weights"]["dtypes"] == ["F32"]
    assert facts["weights"]["differences"] == []
    assert table(tables, "Parameters")["total"][0] == count(total)
    assert table(tables, "Parameter tokens")["qkv"] == ("24", "12 + 12", "12")
    assert table(tables, "Growth history")["exact"][:2] == ("3", "24")
    assert table(tables, "Stored weights")["agree with config.json"] == ("yes",)


def test_a_transformer_in_shards(tmp_path: Path) -> None:
    config = TransformerConfig(
        vocab_size=128,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_bias=True,
        tie_word_embeddings=False,
    )
    directory = save_model(build_model(config), tmp_path / "model", max_shard_size=20_000)
    facts, tables = inspect_path(directory)
    assert len(facts["weights"]["files"]) > 1
    assert facts["weights"]["parameters"] == config.num_parameters()
    assert facts["weights"]["differences"] == []
    assert "head" in table(tables, "Parameters")
    assert "groups" not in facts


def test_weights_that_do_not_agree_with_the_configuration(work: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(work / "run" / "model", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    key = "blocks.0.ffn.key_tokens.1"
    weights[key] = weights[key][:-3].copy()
    save_file(weights, directory / "model.safetensors")
    facts, tables = inspect_path(directory)
    ffn = facts["parameters"]["by_part"]["ffn"]
    expected = f"ffn: the weights hold {count(ffn - 3 * 32)} parameters, config.json says {count(ffn)}"
    assert facts["weights"]["differences"] == [expected]
    assert table(tables, "Stored weights")["agree with config.json"] == ("no",)
    assert table(tables, "Stored weights")["difference"] == (expected,)


def test_a_run_directory(work: Path) -> None:
    facts, tables = inspect_path(work / "run")
    assert facts["kind"] == "run"
    assert [(stage["name"], stage["steps"], stage["tokens"]) for stage in facts["stages"]] == [
        ("small", 3, 384),
        ("large", 2, 256),
    ]
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert facts["metrics"]["lines"] == len(lines)
    latest: dict[str, Any] = facts["metrics"]["latest"]
    assert (latest["step"], latest["tokens"]) == (5, 640)
    assert latest["loss"] == [line["loss"] for line in lines if "loss" in line][-1]
    assert latest["val_loss"] == [line["val_loss"] for line in lines if "val_loss" in line][-1]
    assert [found["state"]["step"] for found in facts["checkpoints"]] == [3, 5]
    assert facts["model"]["parameters"] == inspect_path(work / "run" / "model").data["parameters"]
    assert table(tables, "Stages")["large"][2] == "factor 2.0, init exact"
    assert facts["stages"][-1]["total_flops"] == pytest.approx(latest["flops"])  # as the run counted
    assert set(table(tables, "Checkpoints")) == {"step-00000003", "step-00000005"}


def test_a_training_checkpoint(work: Path) -> None:
    path = work / "run" / "checkpoints" / "step-00000003"
    facts, tables = inspect_path(path)
    assert facts["kind"] == "checkpoint"
    assert (facts["state"]["step"], facts["state"]["tokens"]) == (3, 384)
    assert facts["bytes"] == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert facts["groups"] == {"qkv": [12], "proj": [16], "ffn": [20]}
    assert table(tables, "training checkpoint")["step"] == ("3",)


def test_a_data_directory(work: Path) -> None:
    facts, tables = inspect_path(work / "data")
    assert facts["kind"] == "data"
    splits = facts["splits"]
    assert splits["train"]["documents"] + splits["validation"]["documents"] == 40
    for name, split in splits.items():
        assert (
            split["tokens"] == split["utf8_bytes"] + split["documents"]
        )  # bytes, and an end for each document
        assert split["bytes_on_disk"] == (work / "data" / f"{name}.bin").stat().st_size
    samples = [sample for sample in facts["samples"] if sample["split"] == "train"]
    assert len(samples) == 3
    assert len({sample["document"] for sample in samples}) == 3
    for sample in samples:
        assert sample["text"].startswith("[bold]Text[/bold] number")
        assert sample["text"].isprintable()
        assert len(sample["text"]) <= 103
    assert table(tables, "Splits")["train"][0] == count(splits["train"]["documents"])


@pytest.mark.parametrize("part", ["run", "run/model", "run/checkpoints/step-00000003", "data"])
def test_facts_are_json_and_need_no_torch(work: Path, part: str) -> None:
    script = (
        "import json, sys; from tokenformer.report.inspect import inspect_path; "
        "print(json.dumps(inspect_path(sys.argv[1]).data, allow_nan=False)); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(work / part)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(work / part)


def test_what_is_none_of_ours(work: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, found in (("absent", "nothing"), ("empty", "none of their files"), ("file", "a file")):
        with pytest.raises(TokenFormerError, match=f"found {found}; expected a model directory"):
            inspect_path(tmp_path / name)


def test_damaged_directories_are_reported(work: Path, tmp_path: Path) -> None:
    model = shutil.copytree(work / "run" / "model", tmp_path / "model")
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:100])
    with pytest.raises(TokenFormerError, match=r"model\.safetensors: damaged"):
        inspect_path(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(TokenFormerError, match=r"model\.safetensors"):
        inspect_path(model)
    data = shutil.copytree(work / "data", tmp_path / "data")
    (data / "train.bin").write_bytes((data / "train.bin").read_bytes()[:-2])
    with pytest.raises(TokenFormerError, match=r"train\.bin: truncated"):
        inspect_path(data)


def test_a_run_that_has_just_begun(work: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((work / "run" / "config.yaml").read_text())
    facts, tables = inspect_path(tmp_path)
    assert facts["metrics"] == {"lines": 0, "latest": {}}
    assert (facts["checkpoints"], facts["model"]) == ([], None)
    assert [table.title for table in tables] == [
        f"run: {tmp_path}",
        "Stages",
        "Memory of training on one device (predicted)",
    ]


def test_sizes_as_people_read_them() -> None:
    assert [byte_size(n) for n in (0, 1023, 1536, 3 * 2**30, 2**52)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
        "4096.0 TiB",
    ]
