"""Whole runs: a ladder as one configuration, metrics, starts from models and checkpoints, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tokenformer.errors import TokenFormerError
from tokenformer.language.prepare import prepare
from tokenformer.models.directory import load_model
from tokenformer.models.registry import load_config
from tokenformer.train.checkpoint.contents import read_checkpoint
from tokenformer.train.checkpoint.folder import list_checkpoints
from tokenformer.train.config import RunConfig, load_run_config
from tokenformer.train.metrics import read_metrics
from tokenformer.train.run import RunResult, train

MakeConfig = Callable[..., RunConfig]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(directory).state_dict())


@pytest.fixture
def finished_ladder(ladder: RunConfig, tmp_path: Path) -> RunResult:
    return train(ladder, tmp_path / "run", quiet=True)


def test_run_learns(make_config: MakeConfig, tmp_path: Path) -> None:
    result = train(make_config("steps=20", "evaluation.every_steps=5"), tmp_path / "run", quiet=True)
    losses = [line["val_loss"] for line in read_metrics(tmp_path / "run") if "val_loss" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.5
    assert losses[-1] == result.metrics["val_loss"]


def test_run_directory(finished_ladder: RunResult, ladder: RunConfig) -> None:
    out = finished_ladder.out
    assert load_run_config(out / "config.yaml") == ladder
    assert [path.name for path in list_checkpoints(out)] == ["step-00000008", "step-00000010"]
    assert not [path for path in out.rglob(".*") if path.name != ".metadata"]
    assert sorted(path.name for path in finished_ladder.model.iterdir()) == [
        "README.md",
        "config.json",
        "configuration_tokenformer.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_tokenformer.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    card = (finished_ladder.model / "README.md").read_text()
    for said in (
        "text.txt",
        "| tokens | 768 |",
        "bits per byte",
        "Grown after 4 steps",
        "Grown after 8 steps",
        "largest",
    ):
        assert said in card, said


def test_ladder_grows_twice(finished_ladder: RunResult) -> None:
    config = load_config(finished_ladder.model)
    assert config.param_token_groups.qkv == (8, 8, 8)  # type: ignore[attr-defined]
    assert config.param_token_groups.proj == (8, 8)  # type: ignore[attr-defined]
    assert config.param_token_groups.ffn == (16, 16, 8)  # type: ignore[attr-defined]
    assert [entry.step for entry in config.growth_history] == [4, 8]  # type: ignore[attr-defined]


def test_metrics_are_cumulative(finished_ladder: RunResult) -> None:
    lines = read_metrics(finished_ladder.out)
    for name in ("step", "stage", "tokens", "flops", "seconds"):
        values = [line[name] for line in lines]
        assert values == sorted(values), name
    last = lines[-1]
    assert (last["step"], last["stage"], last["tokens"]) == (10, 2, 8 * 64 + 2 * 128)
    configs = [read_checkpoint(path).model.config for path in list_checkpoints(finished_ladder.out)]
    flops = {line["step"]: line["flops"] for line in lines}
    assert flops[10] - flops[8] == pytest.approx(2 * 128 * configs[-1].flops_per_token(16))
    assert flops[8] - flops[4] == pytest.approx(4 * 64 * configs[0].flops_per_token(16))
    training = [line for line in lines if "loss" in line]
    assert {"lr", "grad_norm", "tokens_per_second"} <= training[0].keys()
    assert {"val_loss", "val_perplexity", "val_bits_per_byte"} <= last.keys()


def test_growth_is_measured_and_exact(finished_ladder: RunResult) -> None:
    grown = [line for line in read_metrics(finished_ladder.out) if "logit_change" in line]
    assert [(line["step"], line["stage"]) for line in grown] == [(4, 1), (8, 2)]
    assert all(line["logit_change"] <= 1e-6 for line in grown)


def test_moments_survive_growth(finished_ladder: RunResult) -> None:
    moments = read_checkpoint(finished_ladder.checkpoint).moments
    steps = {name: int(entry["step"]) for name, entry in moments.items()}
    assert steps["embedding.weight"] == 10
    assert steps["blocks.0.attention.query.key_tokens.0"] == 10
    assert steps["blocks.0.attention.query.key_tokens.1"] == 6
    assert steps["blocks.0.attention.query.key_tokens.2"] == 2
    assert steps["blocks.1.attention.proj.value_tokens.1"] == 6


def test_micro_batches_do_not_change_the_result(make_config: MakeConfig, tmp_path: Path) -> None:
    def trained(size: int | str) -> dict[str, torch.Tensor]:
        # Adam divides a gradient of nearly zero by itself: with its usual eps the step would be the rounding's sign
        config = make_config(f"data.micro_batch_size={size}", "optimizer.eps=1e-5")
        return weights(train(config, tmp_path / str(size), quiet=True).model)

    results = {size: trained(size) for size in ("null", 2, 1)}
    for size in (2, 1):
        for name, whole in results["null"].items():
            torch.testing.assert_close(results[size][name], whole, rtol=0, atol=1e-6, msg=f"{name}, {size}")


def test_frozen_group_stays_bit_identical(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        stages=[{"steps": 3}, {"steps": 3, "grow": {"factor": 2}, "optimizer": {"frozen_groups": [0]}}]
    )
    result = train(config, tmp_path / "run", quiet=True)
    before, after = (read_checkpoint(path).model.state_dict() for path in list_checkpoints(result.out))
    for name, tensor in before.items():
        frozen = name.endswith(("key_tokens.0", "value_tokens.0"))
        assert torch.equal(after[name], tensor) == frozen, name


def test_values_of_zero_up_a_ladder(make_config: MakeConfig, tmp_path: Path) -> None:
    grow = {"factor": 2, "new_tokens": "zero_values"}
    config = make_config(stages=[{"steps": 2}, {"steps": 2, "grow": grow}])
    result = train(config, tmp_path / "run")
    (grown,) = (line for line in read_metrics(result.out) if "logit_change" in line)
    assert grown["logit_change"] <= 1e-6
    assert weights(result.model)["blocks.0.ffn.value_tokens.1"].abs().min() > 0
    assert load_config(result.model).growth_history[0].new_tokens == "zero_values"  # type: ignore[attr-defined]


@pytest.mark.parametrize("init", ["copies", "random"])
def test_other_ways_to_grow(make_config: MakeConfig, tmp_path: Path, init: str) -> None:
    config = make_config(
        stages=[
            {"steps": 2, "optimizer": {"frozen_groups": [0]}},
            {"steps": 2, "grow": {"factor": 2, "init": init}},
        ]
    )
    result = train(config, tmp_path / "run", quiet=True)
    moments = read_checkpoint(result.checkpoint).moments
    assert moments["embedding.weight"]["step"] == (4 if init == "copies" else 2)
    assert (result.metrics["logit_change"] <= 1e-5) == (init == "copies")


def test_start_from_a_model_directory(make_config: MakeConfig, tmp_path: Path) -> None:
    first = train(make_config(), tmp_path / "first", quiet=True)
    second = train(
        make_config(
            "optimizer.lr=1e-12", "optimizer.weight_decay=0", model=None, init_from=str(tmp_path / "first")
        ),
        tmp_path / "second",
        quiet=True,
    )
    assert second.state.step == 6
    before, after = weights(first.model), weights(second.model)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-8)
    assert read_checkpoint(second.checkpoint).moments["norm.weight"]["step"] == 6


def test_start_from_a_checkpoint_goes_on_with_moments_steps_and_data(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    flat = "schedule={name: constant, warmup_steps: 0}"
    whole = train(make_config("steps=8", flat), tmp_path / "whole", quiet=True)
    first = train(make_config("steps=5", flat), tmp_path / "first", quiet=True)
    config = make_config("steps=3", flat, model=None, init_from=str(first.checkpoint))
    second = train(config, tmp_path / "second", quiet=True)
    for name in ("step", "tokens", "flops", "next_sample"):
        assert getattr(second.state, name) == getattr(whole.state, name), name
    for name, tensor in weights(whole.model).items():
        assert torch.equal(weights(second.model)[name], tensor), name


def test_start_from_a_checkpoint_may_grow_first(make_config: MakeConfig, tmp_path: Path) -> None:
    first = train(make_config(), tmp_path / "first", quiet=True)
    config = make_config(
        model=None, init_from=str(first.checkpoint), stages=[{"steps": 2, "grow": {"factor": 1.5}}]
    )
    second = train(config, tmp_path / "second", quiet=True)
    moments = read_checkpoint(second.checkpoint).moments
    assert moments["blocks.0.ffn.key_tokens.0"]["step"] == 8
    assert moments["blocks.0.ffn.key_tokens.1"]["step"] == 2


def test_another_data_order_begins_at_its_first_sample(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(stages=[{"steps": 2}, {"steps": 2, "data": {"sequence_length": 8}}, {"steps": 1}])
    result = train(config, tmp_path / "run", quiet=True)
    positions = [read_checkpoint(path).state.next_sample for path in list_checkpoints(result.out)]
    assert positions == [2 * 8, 1 * 4]


def test_transformer_trains(make_config: MakeConfig, tmp_path: Path) -> None:
    model = {
        "architecture": "transformer",
        "vocab_size": 384,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    result = train(make_config(model=model), tmp_path / "run", quiet=True)
    assert load_config(result.model).architecture == "transformer"


def test_tensorboard_events(make_config: MakeConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(make_config("logging.tensorboard=true"), tmp_path / "run", quiet=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]


def test_quiet_run_prints_nothing(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(make_config(), tmp_path / "run", quiet=True)
    assert capfd.readouterr() == ("", "")


def test_settings_of_the_process_are_put_back(make_config: MakeConfig, tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.get_rng_state()
    train(make_config("precision.deterministic=true", "parallel.num_threads=2"), tmp_path / "run", quiet=True)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not torch.are_deterministic_algorithms_enabled()


def test_bfloat16_on_the_cpu(make_config: MakeConfig, tmp_path: Path) -> None:
    result = train(make_config("precision.dtype=bfloat16"), tmp_path / "run", quiet=True)
    assert all(tensor.dtype == torch.float32 for tensor in weights(result.model).values())


class TestRefusals:
    """Found before anything is written."""

    def refused(self, config: RunConfig, out: Path) -> str:
        with pytest.raises(TokenFormerError) as caught:
            train(config, out, quiet=True)
        return str(caught.value)

    def test_unreachable_device(self, make_config: MakeConfig, tmp_path: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
        message = self.refused(make_config("parallel.device=cuda"), tmp_path / "run")
        assert "'cuda' was asked for, but this machine offers no CUDA device" in message
        assert not (tmp_path / "run").exists()

    def test_missing_data(self, make_config: MakeConfig, tmp_path: Path) -> None:
        assert "no such directory" in self.refused(
            make_config(f"data.path={tmp_path}/nothing"), tmp_path / "run"
        )
        assert not (tmp_path / "run").exists()

    def test_output_with_other_content(self, make_config: MakeConfig, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("precious")
        assert "already there" in self.refused(make_config(), tmp_path)
        with pytest.raises(TokenFormerError, match="already there"):
            train(make_config(), tmp_path, resume=True, quiet=True)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_existing_run_without_resume(self, make_config: MakeConfig, tmp_path: Path) -> None:
        train(make_config("steps=1"), tmp_path / "run", quiet=True)
        assert "--resume" in self.refused(make_config("steps=1"), tmp_path / "run")

    def test_vocabulary(self, make_config: MakeConfig, tmp_path: Path) -> None:
        message = self.refused(make_config("model.vocab_size=256"), tmp_path / "run")
        assert "the model has 256, expected 384" in message

    def test_another_tokenizer(self, make_config: MakeConfig, tmp_path: Path, data_directory: Path) -> None:
        first = train(make_config("steps=1"), tmp_path / "first", quiet=True)
        prepare([data_directory.parent / "text.txt"], tmp_path / "bpe", tokenizer="bpe:300")
        for source in (first.model, first.checkpoint):
            config = make_config(f"data.path={tmp_path}/bpe", model=None, init_from=str(source))
            assert "is not the model's" in self.refused(config, tmp_path / "run")

    def test_data_with_another_tokenizer_when_it_goes_on(
        self, make_config: MakeConfig, tmp_path: Path, data_directory: Path
    ) -> None:
        prepare([data_directory.parent / "text.txt"], tmp_path / "data")
        config = make_config(f"data.path={tmp_path}/data", "steps=1")
        train(config, tmp_path / "run", quiet=True)
        shutil.rmtree(tmp_path / "data")
        prepare([data_directory.parent / "text.txt"], tmp_path / "data", tokenizer="bpe:300")
        with pytest.raises(TokenFormerError, match="is not the model's"):
            train(config, tmp_path / "run", resume=True, quiet=True)

    def test_context_of_an_existing_model(self, make_config: MakeConfig, tmp_path: Path) -> None:
        first = train(make_config("steps=1"), tmp_path / "first", quiet=True)
        config = make_config("data.sequence_length=64", model=None, init_from=str(first.model))
        assert "max_position_embeddings is 32" in self.refused(config, tmp_path / "run")

    def test_growth_of_an_existing_model(self, make_config: MakeConfig, tmp_path: Path) -> None:
        first = train(make_config("steps=1"), tmp_path / "first", quiet=True)
        config = make_config(
            model=None, init_from=str(first.model), stages=[{"steps": 1, "grow": {"qkv": 4}}]
        )
        assert "stages.0.grow: qkv: found 4" in self.refused(config, tmp_path / "run")

    def test_init_from_nothing(self, make_config: MakeConfig, tmp_path: Path) -> None:
        config = make_config(model=None, init_from=str(tmp_path / "nothing"))
        message = self.refused(config, tmp_path / "run")
        assert message.startswith("init_from: ")
        assert "no such directory" in message

    def test_group_that_a_later_stage_does_not_have(self, make_config: MakeConfig, tmp_path: Path) -> None:
        stages = [{"steps": 1}, {"steps": 1, "grow": {"factor": 2}, "optimizer": {"frozen_groups": [2]}}]
        message = self.refused(make_config(stages=stages), tmp_path / "run")
        assert "stages.1.optimizer.frozen_groups: 2: expected a group from 0 to 1" in message


def test_metrics_lines_are_json_also_when_not_finite(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("optimizer.lr=1e4", "optimizer.grad_clip=null", "steps=4")
    result = train(config, tmp_path / "run", quiet=True)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for line in (result.out / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)
