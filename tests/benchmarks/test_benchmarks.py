"""The benchmark scripts in a small form: they run, and what they write is what they say."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenformer.language.prepare import prepare
from tokenformer.language.tokenizers import ByteTokenizer, train_bpe
from tokenformer.models.directory import save_model
from tokenformer.models.registry import build_model
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.ops.pattention import NORM_ACTIVATIONS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    finally:
        torch.set_num_threads(threads)


def test_pattention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "pattention.json"
    arguments = ("--shapes", "64x16x24", "--repeats", 2, "--threads", 1, "--device", "cpu")
    run_script(monkeypatch, "pattention.py", *arguments, "--json", written)
    results = json.loads(written.read_text())["results"]
    assert [result["kind"] for result in results] == list(NORM_ACTIVATIONS)
    for result in results:
        assert (result["rows"], result["features"], result["tokens"]) == (64, 16, 24)
        assert result["error"] < 1e-5
        assert result["ratio"]["products"] == 1
        assert set(result["seconds"]) == {"products", "ours", "definition", "published"}
        assert min(result["seconds"].values()) > 0
    printed = capsys.readouterr().out
    assert "64 x 16, n = 24" in printed
    assert all(kind in printed for kind in NORM_ACTIVATIONS)


def test_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "pipeline.json"
    sizes = ("--sequence-length", 64, "--tokens", 1e6, "--large-tokens", 2e7, "--batches", 3, "--repeats", 2)
    run_script(monkeypatch, "pipeline.py", *sizes, "--json", written)
    values = json.loads(written.read_text())
    assert list(values["million_tokens_per_second"]) == ["windows", "mixture", "documents", "usual loop"]
    assert min(values["million_tokens_per_second"].values()) > 0
    assert len(values["seconds_to_first_batch"]) == 4
    assert "million tokens/s" in capsys.readouterr().out


def test_train_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "train_step.json"
    monkeypatch.setitem(sys.modules, "transformers", None)  # a side that fails
    sides = ("gpt_neox", "ours", "groups", "accumulated", "recomputed", "formula", "published", "transformer")
    arguments = ("--models", "tiny", "--repeats", 2, "--device", "cpu", "--sides", *sides)
    run_script(monkeypatch, "train_step.py", *arguments, "--json", written)
    failed, *results = json.loads(written.read_text())["results"]
    assert failed["side"] == "gpt_neox"
    assert "transformers" in failed["error"]
    assert tuple(result["side"] for result in results) == sides[1:]
    assert len({result["parameters"] for result in results[:5]}) == 1
    assert results[5]["parameters"] == pytest.approx(results[0]["parameters"], rel=0.02)
    for index in (2, 3, 4):  # the same weights and batches
        assert results[index]["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)
        assert results[index]["last_loss"] == pytest.approx(results[0]["last_loss"], rel=1e-1)
    assert min(result["tokens_per_second"] for result in results) > 0
    assert "ours / transformer: tokens/s" in capsys.readouterr().out


def test_float8_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten. " * 40)
    written = tmp_path / "curve.json"
    sizes = ("--steps", 12, "--sequences", 2, "--length", 16, "--window", 3, "--lr", 1e-2)
    arguments = (tmp_path / "text.txt", "--model", "tiny", "--device", "cpu", *sizes)
    run_script(monkeypatch, "float8_curve.py", *arguments, "--seeds", 0, 3, "--json", written)
    values = json.loads(written.read_text())
    first, second = values["runs"]
    means = first["means"]["float8"]
    assert means == first["means"]["bfloat16"]  # the same order of the same text
    assert means != second["means"]["float8"]
    assert len(means) == 4
    assert means[-1] < means[0]
    assert first["ratios"] == values["mean_ratios"] == [1.0] * 4
    assert values["standard_errors"] == [0.0] * 4
    output = capsys.readouterr().out
    assert "seed 3" in output
    assert output.endswith("    9 -   12   1.00000   0.00000\n")


def test_float8_curve_sums_up_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = runpy.run_path(str(BENCHMARKS / "float8_curve.py"))
    summary = script["summarized"]([[1.0, 1.02], [1.01, 1.0], [1.02, 1.01]])
    assert summary["mean_ratios"] == pytest.approx([1.01, 1.01])
    assert summary["standard_errors"] == pytest.approx([0.01 / 3**0.5] * 2)


def test_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "generate.json"
    arguments = ("--prompt-tokens", 8, 16, "--new-tokens", 3, "--threads", 1, "--out", written)
    run_script(monkeypatch, "generate_cpu.py", *arguments)
    rows = json.loads(written.read_text())["rows"]
    assert [row["prompt_tokens"] for row in rows] == [8, 16]
    assert all(min(row["prefill_ms"], row["token_ms"], row["attention_ms"]) > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 4


TINY = {
    "validation_fraction": 0.3,
    "evaluation_tokens": 128,
    "shared.data.sequence_length": 16,
    "shared.data.batch_tokens": 64,
    "runs.small.steps": 2,
    "runs.grown.steps": 1,
    **{f"runs.{name}.model.num_hidden_layers": 1 for name in ("small", "large", "transformer")},
}


def sweep(out: Path, corpus: Path) -> subprocess.CompletedProcess[str]:
    overrides = [f"corpus=[{corpus}]", *(f"{name}={value}" for name, value in TINY.items())]
    options = ["--tiny", "--workers", "1", "--seeds", "1", "--keep", "1", "--out", str(out)]
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "quickstart_sweep.py"), *overrides, *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_quickstart_sweep(tmp_path: Path) -> None:
    corpus = tmp_path / "texts"
    corpus.mkdir()
    for index in range(10):
        (corpus / f"{index}.txt").write_text("\n".join(f"{line} times {index}" for line in range(60)))
    done = sweep(tmp_path / "sweep", corpus)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()
    results: list[dict[str, Any]] = [json.loads(line) for line in lines]
    sides = [result["side"] for result in results]
    assert {side: sides.count(side) for side in sides} == {
        "small": 3,
        "large": 3,
        "transformer": 3,
        "grown": 3,
    }
    assert all(0 < result["bits_per_byte"] < 13 for result in results)
    grown = max(result["flops"] for result in results if result["side"] == "grown")
    for result in results:
        if result["side"] in ("large", "transformer"):
            assert result["flops"] == pytest.approx(grown, rel=0.5)  # a step is a large share of so few
    assert {result["seed"] for result in results} == {0, 1}
    for side in ("small", "grown", "large", "transformer"):
        assert f"\n{side}\n" in done.stdout
    again = sweep(tmp_path / "sweep", corpus)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "sweep" / "results.jsonl").read_text().splitlines() == lines


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "load.json"
    arguments = ("--small", "--repeats", 1, "--cold", "--directory", tmp_path, "--json", written)
    run_script(monkeypatch, "load.py", *arguments)
    values = json.loads(written.read_text())
    assert values["bytes"] > 5e7
    assert 0.9 < values["added_ratio"] < 1.3  # every page was brought in, and once
    assert all(seconds > 0 for seconds in values["seconds"].values())
    assert "cold page cache, median of 1" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["load.json"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_prepare(tmp_path: Path) -> None:
    lines = (json.dumps({"text": f"words of document {number} " * 20}) for number in range(400))
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    made = prepare([tmp_path / "corpus.jsonl"], tmp_path / "bpe", tokenizer="bpe:300")
    written = tmp_path / "prepare.json"
    options = [
        "--tokenizer",
        made.path / "tokenizer.json",
        "--repeats",
        "2",
        "--copies",
        "3",
        "--workers",
        "2",
    ]
    command = [sys.executable, BENCHMARKS / "prepare.py", tmp_path / "corpus.jsonl", *options]
    done = subprocess.run([*command, "--json", written], capture_output=True, text=True, check=True)
    values = json.loads(written.read_text())
    rows = {row["what"]: row for row in values["rows"]}
    assert list(rows) == ["encode_batch", "prepare", "prepare, 3 copies"]
    assert all(row["peak_megabytes"] > 20 and row["seconds"] > 0 for row in rows.values())
    assert values["ratio"] > 0
    assert f"prepare has {values['ratio']:.2f} of the throughput" in done.stdout


def test_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / "checkpoint.json"
    arguments = ("--model", "tiny", "--every", 2, "--steps", 4, "--rounds", 1, "--device", "cpu")
    modes = ("--modes", "thread", "at once", "--when-busy", "wait", "--folder", tmp_path)
    run_script(monkeypatch, "checkpoint.py", *arguments, *modes, "--json", written)
    (numbers,) = json.loads(written.read_text())["folders"].values()
    results = numbers["results"]
    assert set(results) == {"none", "thread", "at once"}
    assert results["none"]["of_none"] == 1
    assert all(result["mean_ms"] > 0 for result in results.values())
    assert results["at once"]["saves"] == results["at once"]["complete_in_time"] == 2
    assert results["thread"]["left_out"] == 0
    assert numbers["checkpoint_bytes"] > 0


@pytest.mark.slow
def test_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [f"the number after {number} is {number + 1}" for number in range(24)]
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_bpe(texts, 300)
    tokenizer.save(tmp_path / "tokenizer")
    written = tmp_path / "harness.json"
    files = (tmp_path / "passages.jsonl", "--tokenizer", tmp_path / "tokenizer" / "tokenizer.json")
    sizes = ("--batch-sizes", "auto", "4", "--hflm-batch-sizes", "8", "--repeats", 1, "--limit", 20)
    options = ("--tiny", "--device", "cpu", "--dtype", "float32", "--json", written)
    run_script(monkeypatch, "harness.py", *files, *sizes, *options)
    numbers = json.loads(written.read_text())
    assert numbers["requests"] == 20
    assert list(numbers["batch_sizes"]["ours"]) == ["auto", "4"]
    for seconds in numbers["seconds"].values():
        assert list(seconds) == ["ours", "transformer", "hflm"]
        assert all(min(values) > 0 for values in seconds.values())
    assert numbers["parity"]["float32"] < 1e-4
    assert numbers["parity"]["float32, greedy differs"] == 0


@pytest.mark.slow
def test_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} squared is {i * i}." for i in range(4000)))
    sizes = ("--base-steps", 2, "--steps", 2, "--seeds", 1, "--rates", 1e-3, 1e-2)
    run_script(monkeypatch, "adapters.py", text, "--out", tmp_path / "out", *sizes)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for rate in ("0.001", "0.01"):
        tokens, lora = results[f"tokens/{rate}/0"], results[f"lora/{rate}/0"]
        assert tokens["parameters"] == lora["parameters"] > 0
    assert results["tokens/0.01/0"]["loss"] < results["tokens/base"]["loss"]
    assert results["gelu_l2_norm/shift"]["shift_largest"] > 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    run_script(monkeypatch, "adapters.py", text, "--out", tmp_path / "out", *sizes)  # nothing is done again
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert "bits per byte" in capsys.readouterr().out


def test_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "decode.json"
    sides = ("ours", "graph", "int8", "plain", "transformer")
    sizes = ("--models", "tiny", "--batches", 1, 2, "--prompts", 8, "--new-tokens", 4, "--repeats", 1)
    options = ("--param-tokens", 1, 2, "--isolate", "graph", "--device", "cpu", "--json", written)
    run_script(monkeypatch, "decode.py", *sizes, "--sides", *sides, *options)
    results = json.loads(written.read_text())["results"]
    assert [(result["side"], result["param_tokens"], result["batch"]) for result in results] == [
        (s, x, b) for s in sides for x in ((1,) if s in ("plain", "transformer") else (1, 2)) for b in (1, 2)
    ]
    assert min(min(result["token_seconds"], result["of_bandwidth"]) for result in results) > 0
    assert max(result["logit_error"] for result in results if "logit_error" in result) < 1e-4
    assert {result["parameters"] for result in results if result["side"] == "ours"} == {34880, 67648}
    printed = capsys.readouterr().out
    assert all(side in printed for side in sides if side != "graph")


def test_decode_goes_on_without_a_side_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "decode.json"
    sizes = ("--models", "tiny", "--prompts", 8, "--new-tokens", 4, "--repeats", 1, "--device", "cpu")
    with pytest.raises(SystemExit):
        run_script(
            monkeypatch, "decode.py", *sizes, "--sides", "ours", "plain", "--limit", 1e-4, "--json", written
        )
    assert all("TimeoutError" in result["error"] for result in json.loads(written.read_text())["results"])
    assert "plain: TimeoutError: longer than 0.0001 s" in capsys.readouterr().out


def test_quantize(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be " * 30)
    prepare([tmp_path / "text.txt"], tmp_path / "data", validation=[tmp_path / "text.txt"])
    config = TransformerConfig(
        vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32
    )
    save_model(build_model(config), tmp_path / "model", tokenizer=ByteTokenizer())
    written = tmp_path / "quantize.json"
    arguments = ("--data", tmp_path / "data", "--device", "cpu", "--json", written)
    run_script(monkeypatch, "quantize.py", tmp_path / "model", *arguments)
    results = json.loads(written.read_text())["results"]
    losses = [result["loss"] for result in results]
    assert len(set(losses)) == 3
    assert losses == pytest.approx([losses[0]] * 3, rel=5e-3)
    assert "int8" in capsys.readouterr().out
