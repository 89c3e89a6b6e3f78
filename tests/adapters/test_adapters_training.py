"""Adapters as users train and use them: a run, its directory, and the commands that take ``--adapter``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tokenformer import grow, load_model, save_model
from tokenformer.adapters.apply import load_with_adapters
from tokenformer.errors import TokenFormerError
from tokenformer.evaluation.perplexity import evaluate_model
from tokenformer.language.prepare import prepare
from tokenformer.models.base import LanguageModel
from tokenformer.models.fingerprint import weights_sha256
from tokenformer.train.checkpoint.contents import read_checkpoint
from tokenformer.train.config import RunConfig
from tokenformer.train.loop import StageLoop
from tokenformer.train.run import RunResult, train
from tokenformer.train.yaml_source import apply_overrides
from tokenformer.validation import validate

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = (f"{i} squared is {i * i}, and {i} plus {i} is {i + i}." for i in range(300))
    (folder / "text.txt").write_text("\n".join(lines))
    prepare([folder / "text.txt"], folder / "data", tokenizer="byte")
    return folder / "data"


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory, make_tokenformer: Any) -> Path:
    model = make_tokenformer(vocab_size=384, norm_activation="gelu_l2_norm")
    path = tmp_path_factory.mktemp("models") / "base"
    return save_model(grow(model, ffn=16), path, tokenizer=data / "tokenizer.json")


def run_values(base: Path, data: Path) -> dict[str, Any]:
    return {
        "init_from": str(base),
        "adapter": {"qkv": 2, "ffn": 3},
        "data": {"path": str(data), "sequence_length": 16, "batch_tokens": 64},
        "optimizer": {"lr": 1e-2},
        "evaluation": {"every_steps": None, "max_tokens": 256},
        "logging": {"every_steps": 2, "tensorboard": False},
        "checkpoint": {"every_steps": 3, "keep_last": 9},
        "steps": 6,
    }


@pytest.fixture
def make_config(base: Path, data: Path) -> MakeConfig:
    def make(*overrides: str, **sections: Any) -> RunConfig:
        values = {k: v for k, v in (run_values(base, data) | sections).items() if v is not None}
        return validate(RunConfig, apply_overrides(values, overrides), source="test")

    return make


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    config = validate(RunConfig, run_values(base, data), source="test")
    return train(config, tmp_path_factory.mktemp("runs") / "mine", quiet=True)


def test_only_the_new_tokens_are_trained_and_saved(trained: RunResult, base: Path) -> None:
    assert trained.model == trained.out / "adapter"
    assert not (trained.out / "model").exists()
    model, frozen = load_with_adapters(base, [trained.model]), load_model(base)
    in_checkpoint = read_checkpoint(trained.checkpoint)
    before = dict(frozen.named_parameters())
    new = {name for name, _ in model.named_parameters()} - before.keys()
    for name, parameter in in_checkpoint.model.named_parameters():
        if name in new:
            assert torch.equal(parameter, model.get_parameter(name))
            assert parameter.abs().max() > 0
        else:
            assert torch.equal(parameter, before[name])
    assert in_checkpoint.moments.keys() == new
    assert {name.rpartition(".")[2] for name in new if "ffn" in name} == {
        "2"
    }  # the base's ffn had two groups
    assert not any("proj" in name for name in new)
    adapter = model.adapters[0].config
    assert (adapter.name, adapter.base.name) == ("mine", "base")
    assert adapter.base.weights_sha256 == weights_sha256(base)
    assert adapter.training["step"] == 6
    size = (trained.model / "adapter_model.safetensors").stat().st_size
    assert size < 4 * adapter.num_parameters() + 8192
    card = (trained.model / "README.md").read_text()
    assert "peak learning rate" in card
    assert adapter.base.weights_sha256 in card


def test_it_starts_from_the_function_of_the_base_and_learns(
    trained: RunResult, base: Path, data: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    start = evaluate_model(base, data, sequence_length=16).evaluation.loss
    short = train(make_config("steps=1", "optimizer.lr=1e-30"), tmp_path / "short", quiet=True)
    unmoved = evaluate_model(base, data, adapters=[short.out], sequence_length=16).evaluation.loss
    assert unmoved == pytest.approx(start, abs=1e-6)
    assert (
        evaluate_model(base, data, adapters=[trained.out], sequence_length=16).evaluation.loss < start - 0.01
    )


def test_resuming_is_exact_and_needs_no_base(
    trained: RunResult, base: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    copied = save_model(load_model(base), tmp_path / "base", tokenizer=base / "tokenizer.json")
    config = make_config(init_from=str(copied))

    class Stop(Exception):
        pass

    original = StageLoop.run

    def interrupted(self: Any, bar: Any) -> Any:
        save = self._save

        def save_and_stop(state: Any, required: bool) -> None:
            save(state, required)
            raise Stop

        self._save = save_and_stop
        return original(self, bar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLoop, "run", interrupted)
        with pytest.raises(Stop):
            train(config, tmp_path / "mine", quiet=True)
    for file in copied.iterdir():
        file.unlink()
    resumed = train(config, tmp_path / "mine", resume=True, quiet=True)
    assert resumed.state.step == 6
    name = "adapter_model.safetensors"
    assert (resumed.model / name).read_bytes() == (trained.model / name).read_bytes()
    again = train(config, tmp_path / "mine", resume=True, quiet=True)
    assert again.model == resumed.model
    (tmp_path / "mine" / "adapter_run.json").unlink()
    with pytest.raises(TokenFormerError, match=r"adapter_run\.json: no such file"):
        train(config, tmp_path / "mine", resume=True, quiet=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {}}, "adapter: expected either factor, or tokens"),
        ({"adapter": {"ffn": 2, "factor": 2}}, "adapter: expected either factor, or tokens"),
        ({"adapter": {"fnn": 2}}, "adapter.fnn: unknown field; did you mean 'ffn'"),
        ({"adapter": {"ffn": -2}}, "adapter.ffn"),
        (
            {"optimizer": {"frozen_groups": [0]}},
            "frozen_groups and frozen_roles have no meaning with adapter",
        ),
        (
            {"steps": None, "stages": [{"steps": 2, "grow": {"factor": 2}}]},
            r"stages\.0\.grow: has no meaning",
        ),
    ],
)
def test_sections_that_cannot_be(sections: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    with pytest.raises(TokenFormerError, match=message):
        make_config(**sections)


def test_an_adapter_needs_a_base(make_config: MakeConfig, make_tokenformer: Any) -> None:
    model = make_tokenformer(vocab_size=384).config.model_dump()
    with pytest.raises(TokenFormerError, match=r"adapter: found model, expected init_from"):
        make_config(init_from=None, model=model)


def test_bases_that_carry_none(
    make_config: MakeConfig,
    make_tokenformer: Any,
    make_transformer: Any,
    trained: RunResult,
    data: Path,
    tmp_path: Path,
) -> None:
    def attempt(model: LanguageModel | Path, name: str) -> None:
        path = model if isinstance(model, Path) else save_model(model, tmp_path / name)
        train(make_config(init_from=str(path)), tmp_path / f"run-{name}", quiet=True)

    with pytest.raises(
        TokenFormerError, match=r"adapter: norm_activation 'softmax' cannot carry an adapter.*exp\(0\)"
    ):
        attempt(make_tokenformer(vocab_size=384, norm_activation="softmax"), "softmax")
    with pytest.raises(TokenFormerError, match="adapter: architecture: found 'transformer'"):
        attempt(make_transformer(vocab_size=384), "transformer")
    with pytest.raises(TokenFormerError, match="is a training checkpoint; the base of an adapter"):
        attempt(trained.checkpoint, "checkpoint")
    with pytest.raises(TokenFormerError, match="an adapter; expected a model directory"):
        attempt(trained.out, "adapter")
    assert not list(tmp_path.glob("run-*/config.yaml"))


def test_commands(
    trained: RunResult, base: Path, data: Path, tmp_path: Path, run_command: Any, make_config: MakeConfig
) -> None:
    plain = run_command("generate", base, "--prompt", "1 squared", "--temperature", 0, "--max-new-tokens", 12)
    adapted = run_command(
        "generate",
        base,
        "--adapter",
        trained.out,
        "--prompt",
        "1 squared",
        "--temperature",
        0,
        "--max-new-tokens",
        12,
    )
    assert (plain.code, adapted.code) == (0, 0)
    assert plain.out != adapted.out

    result = tmp_path / "result.json"
    done = run_command("evaluate", base, "--adapter", trained.model, "--data", data, "--json", result)
    assert done.code == 0
    assert str(trained.model) in done.out
    loss = json.loads(result.read_text())["loss"]

    inspected = run_command("inspect", trained.model, "--json")
    facts = json.loads(inspected.out)
    assert (facts["kind"], facts["name"], facts["fits"]) == ("adapter", "mine", True)
    assert facts["base"]["weights_sha256"] == weights_sha256(base)
    assert weights_sha256(base) in run_command("inspect", trained.out).out

    for option in ([], ["--consolidate"]):
        merged = tmp_path / f"merged{len(option)}"
        done = run_command("convert", "native", "native", base, merged, "--adapter", trained.out, *option)
        assert done.code == 0, done.err
        assert (merged / "tokenizer.json").is_file()
        result = tmp_path / f"merged{len(option)}.json"
        run_command("evaluate", merged, "--data", data, "--json", result)
        assert json.loads(result.read_text())["loss"] == pytest.approx(loss, abs=0 if not option else 1e-5)
        groups = json.loads((merged / "config.json").read_text())["param_token_groups"]["ffn"]
        assert groups == ([19] if option else [12, 4, 3])

    wrong = run_command("evaluate", merged, "--adapter", trained.out, "--data", data)
    assert wrong.code == 2
    assert "Traceback" not in wrong.err
    refused = run_command("evaluate", trained.out, "--data", data)
    assert refused.code == 2
    assert "--adapter" in refused.err
    nothing = run_command("convert", "native", "native", base, tmp_path / "copy")
    assert nothing.code == 2
    assert "--adapter" in nothing.err


def test_the_harness_takes_adapters(trained: RunResult, base: Path) -> None:
    pytest.importorskip("lm_eval")
    from tokenformer.evaluation.harness.model import TokenFormerLM

    tokens = torch.arange(20)[None]
    with torch.no_grad():
        alone, expected = (load_with_adapters(base, each)(tokens).logits for each in ([], [trained.out]))
        found = TokenFormerLM(base, device="cpu", adapter=str(trained.out)).model(tokens).logits
        stacked = TokenFormerLM(base, device="cpu", adapter=f"{trained.out};{trained.model}").model
    assert torch.equal(found, expected)
    assert not torch.equal(found, alone)
    assert len(stacked.adapters) == 2


def test_train_from_the_command_line(base: Path, data: Path, tmp_path: Path, run_command: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(run_values(base, data)))
    done = run_command(
        "train",
        recipe,
        "steps=2",
        "adapter.factor=2",
        "adapter.qkv=0",
        "adapter.ffn=0",
        "--out",
        tmp_path / "run",
    )
    assert done.code == 0, done.err
    assert f"adapter: {tmp_path / 'run' / 'adapter'}" in done.out
    added = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["param_tokens"]
    assert added == {"qkv": 6, "proj": 5, "ffn": 16}
