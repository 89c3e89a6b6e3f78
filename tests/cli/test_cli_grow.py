"""``tokenformer grow`` as users run it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenformer.language.prepare import prepare
from tokenformer.language.tokenizers import ByteTokenizer
from tokenformer.models.directory import load_model, save_model
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.train.checkpoint.contents import read_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "qkv_param_tokens": 8,
    "proj_param_tokens": 8,
    "ffn_param_tokens": 16,
    "max_position_embeddings": 32,
}

RECIPE = """
model: {architecture: tokenformer, vocab_size: 384, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
  qkv_param_tokens: 8, proj_param_tokens: 8, ffn_param_tokens: 16, max_position_embeddings: 32}
data: {path: data, sequence_length: 16, batch_tokens: 64}
logging: {tensorboard: false}
evaluation: {every_steps: null, max_tokens: 64}
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a data directory and a model directory that fit each other."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n".join(f"{i} times {i} is {i * i}" for i in range(200)))
    prepare(["text.txt"], "data")
    save_model(build_model(TokenFormerConfig(**SIZES)), "small", tokenizer=ByteTokenizer())
    return tmp_path


def change_of_logits(out: str) -> float:
    return float(re.search(r"Largest change of a logit: (\S+) of their spread", out)[1])


@pytest.mark.usefixtures("workplace")
class TestModelDirectory:
    def test_exact(self, run_command: Callable[..., Any]) -> None:
        done = run_command("grow", "small", "--out", "large", "--factor", "3.5")
        assert (done.code, done.err) == (0, "")
        rows = [line.split() for line in done.out.splitlines()]
        assert ["qkv", "tokens", "8", "28", "8", "8"] in rows
        assert ["ffn", "tokens", "16", "56", "16", "16"] in rows
        small, large = load_model("small"), load_model("large")
        parameters = [f"{m.config.num_parameters():,}" for m in (small, large)]
        assert ["parameters", *parameters] in rows
        assert change_of_logits(done.out) == 0
        assert "on 128 random token ids" in done.out
        assert "Next: tokenformer inspect large" in done.out
        tokens = torch.arange(64).reshape(2, 32)
        with torch.no_grad():
            assert torch.equal(small(tokens).logits, large(tokens).logits)
        assert Path("large/tokenizer.json").read_bytes() == Path("small/tokenizer.json").read_bytes()
        config = json.loads(Path("large/config.json").read_text())
        assert config["param_token_groups"] == {"qkv": [8, 20], "proj": [8, 20], "ffn": [16, 40]}
        assert [step["init"] for step in config["growth_history"]] == ["exact"]
        assert config["tau"] == {"qkv": 8.0, "proj": 8.0, "ffn": 16.0}
        card = Path("large/README.md").read_text()
        assert "| grown from | small |" in card
        assert "1. Grown (`exact`) to 28 / 28 / 56 tokens" in card

    def test_named_totals_measured_on_text(self, run_command: Callable[..., Any]) -> None:
        done = run_command("grow", "small", "--out", "large", "--qkv", 10, "--ffn", 40, "--data", "data")
        assert done.code == 0, done.err
        assert re.search(r"on \d+ tokens of the validation text of data", done.out)
        config = load_model("large").config
        assert (config.qkv_param_tokens, config.proj_param_tokens, config.ffn_param_tokens) == (10, 8, 40)

    def test_again_and_in_other_ways(self, run_command: Callable[..., Any]) -> None:
        for source, out, init in (("small", "a", "exact"), ("a", "b", "copies"), ("b", "c", "random")):
            done = run_command("grow", source, "--out", out, "--factor", 2, "--init", init, "--seed", 5)
            assert done.code == 0, done.err
            assert (change_of_logits(done.out) < 1e-5) == (init != "random")
            assert f"Growth ({init})" in done.out
        config = load_model("c").config
        assert [step.init for step in config.growth_history] == ["exact", "copies", "random"]
        assert config.groups("ffn") == (16, 16, 16, 16, 64)

    def test_values_of_zero(self, run_command: Callable[..., Any]) -> None:
        done = run_command("grow", "small", "--out", "large", "--factor", 2, "--new-tokens", "zero_values")
        assert done.code == 0, done.err
        assert change_of_logits(done.out) == 0
        assert "new values zero" in done.out
        model = load_model("large")
        assert not model.blocks[0].ffn.value_tokens[1].any()
        assert model.blocks[0].ffn.key_tokens[1].abs().min() > 0
        assert (
            "1. Grown (`exact`, new values zero) to 16 / 16 / 32 tokens"
            in Path("large/README.md").read_text()
        )

    def test_the_seed_draws_the_tokens(self, run_command: Callable[..., Any]) -> None:
        for out, seed in (("a", 1), ("b", 1), ("c", 2)):
            assert run_command("grow", "small", "--out", out, "--factor", 2, "--seed", seed).code == 0
        a, b, c = (load_model(path).blocks[0].ffn.value_tokens[1] for path in "abc")
        assert torch.equal(a, b)
        assert not torch.equal(a, c)

    def test_half_precision_stays(self, run_command: Callable[..., Any]) -> None:
        save_model(load_model("small", dtype=torch.bfloat16), "narrow")
        done = run_command("grow", "narrow", "--out", "large", "--factor", 2)
        assert (done.code, done.err) == (0, "")
        assert {p.dtype for p in load_model("large").parameters()} == {torch.bfloat16}
        assert not Path("large/tokenizer.json").exists()

    def test_an_exact_growth_that_moves_the_function_is_reported(
        self, run_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        grow = "tokenformer.layers.pattention.Pattention.grow"
        monkeypatch.setattr(grow, _grow_wrongly)
        done = run_command("grow", "small", "--out", "large", "--factor", 2)
        assert change_of_logits(done.out) > 1e-6
        assert "WARNING: exact growth must not move the logits by more than 1e-6" in done.err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "grow: expected either factor, or some of qkv, proj and ffn"),
            (["--factor", 2, "--qkv", 16], "grow: expected either factor, or some of qkv, proj and ffn"),
            (["--factor", 0.5], "grow: factor: found 0.5; input should be greater than 1"),
            (
                ["--factor", 2, "--init", "zero"],
                "grow: init: found 'zero'; input should be 'exact', 'copies' or",
            ),
            (["--ffn", 15], "ffn: found 15, but there are 16 parameter tokens already; growth only adds"),
            (["--ffn", 16], "nothing would grow"),
            (
                ["--ffn", 40, "--init", "copies"],
                "found 40, but init 'copies' needs a whole multiple of the 16",
            ),
            (
                ["--factor", 2, "--init", "random", "--new-tokens", "zero_values"],
                "new_tokens 'zero_values' belongs to init 'exact', but init is 'random'",
            ),
            (
                ["--hidden-size", 32],
                "hidden_size: growth changes the number of parameter tokens, never width or depth",
            ),
            (
                ["--factor", 2, "--num-hidden-layers", 4],
                "num_hidden_layers: growth changes the number of parameter",
            ),
            (["--factor", 2, "--data", "nowhere"], "nowhere: no such directory; expected a data directory"),
        ],
        ids=str,
    )
    def test_refusals_write_nothing(
        self, run_command: Callable[..., Any], arguments: list[object], message: str
    ) -> None:
        done = run_command("grow", "small", "--out", "large", *arguments)
        assert done.code == 2
        assert message in done.err
        assert "Traceback" not in done.err
        assert sorted(path.name for path in Path().iterdir()) == ["data", "small", "text.txt"]

    def test_softmax_names_copies(self, run_command: Callable[..., Any]) -> None:
        save_model(build_model(TokenFormerConfig(**SIZES, norm_activation="softmax")), "softmax")
        done = run_command("grow", "softmax", "--out", "large", "--factor", 2)
        assert done.code == 2
        assert "use init 'copies'" in done.err
        done = run_command("grow", "softmax", "--out", "large", "--factor", 2, "--init", "copies")
        assert done.code == 0
        assert change_of_logits(done.out) < 1e-5

    def test_sources_that_cannot_grow(self, run_command: Callable[..., Any]) -> None:
        shared = {name: SIZES[name] for name in list(SIZES)[:4]}
        save_model(build_model(TransformerConfig(**shared)), "transformer")
        for source, message in (
            ("transformer", "architecture: found 'transformer', which has no parameter tokens to grow"),
            ("nowhere", "nowhere: no such directory; expected a model directory"),
            ("owner/name", "fetch it first: hf download owner/name --local-dir DIR"),
            ("data", "data: holds neither; expected a model directory"),
            ("text.txt", "text.txt: a file; expected a model directory"),
        ):
            done = run_command("grow", source, "--out", "large", "--factor", 2)
            assert done.code == 2
            assert message in done.err
            assert not Path("large").exists()

    def test_damaged_weights_are_said(self, run_command: Callable[..., Any]) -> None:
        model = load_model("small")
        with torch.no_grad():
            model.blocks[0].ffn.value_tokens[0][1, 2] = float("nan")  # type: ignore[union-attr]
        save_model(model, "damaged")
        done = run_command("grow", "damaged", "--out", "large", "--factor", 2)
        assert (done.code, "not finite (NaN or infinity)" in done.err) == (2, True)
        assert not Path("large").exists()

    def test_an_output_with_content_stays(self, run_command: Callable[..., Any]) -> None:
        done = run_command("grow", "small", "--out", "data", "--factor", 2)
        assert done.code == 2
        assert "data: a directory with content is already there" in done.err
        assert not Path("data/config.json").exists()

    def test_data_of_another_tokenizer(self, run_command: Callable[..., Any]) -> None:
        prepare(["text.txt"], "bpe", tokenizer="bpe:300")
        done = run_command("grow", "small", "--out", "large", "--factor", 2, "--data", "bpe")
        assert done.code == 2
        assert "is not the model's" in done.err
        assert not Path("large").exists()


def _grow_wrongly(
    layer: Any, num_param_tokens: int, init: str, generator: torch.Generator, *, new_tokens: str
) -> None:
    fresh = num_param_tokens - layer.num_param_tokens
    tokens = torch.randn(fresh, layer.in_features, generator=generator)
    layer.append(1e-2 * tokens, tokens)


@pytest.mark.usefixtures("workplace")
class TestRunsAndCheckpoints:
    def test_a_run_means_its_model(self, run_command: Callable[..., Any]) -> None:
        Path("tiny.yaml").write_text(RECIPE + "steps: 2\n")
        assert run_command("train", "tiny.yaml", "--out", "run").code == 0
        done = run_command("grow", "run", "--out", "large", "--factor", 2, "--data", "data")
        assert done.code == 0, done.err
        assert change_of_logits(done.out) == 0
        assert load_model("large").config.ffn_param_tokens == 32

    def test_a_grown_checkpoint_goes_on_as_a_ladder_would(self, run_command: Callable[..., Any]) -> None:
        """Train, grow, train as three commands gives the weights of the ladder, bit for bit."""
        Path("ladder.yaml").write_text(RECIPE + "stages: [{steps: 3}, {steps: 3, grow: {factor: 2}}]\n")
        assert run_command("train", "ladder.yaml", "--out", "ladder").code == 0
        Path("first.yaml").write_text(RECIPE + "steps: 3\n")
        assert run_command("train", "first.yaml", "--out", "first").code == 0

        checkpoint = "first/checkpoints/step-00000003"
        done = run_command("grow", checkpoint, "--out", "grown", "--factor", 2, "--seed", 1)
        assert done.code == 0, done.err
        assert "Next: tokenformer train RECIPE, with init_from: grown" in done.out
        before, after = read_checkpoint(checkpoint), read_checkpoint("grown")
        assert after.state == before.state
        assert after.state.step == 3
        assert after.state.next_sample == 12
        assert after.model.config.growth_history[0].step == 3
        assert after.moments.keys() == before.moments.keys()
        for name, state in before.moments.items():
            for key, value in state.items():
                assert torch.equal(after.moments[name][key], value)
        assert (after.tokenizer is not None, after.run_config) == (True, None)

        recipe = RECIPE.replace(RECIPE[1 : RECIPE.index("data:")], "init_from: grown\n") + "steps: 3\n"
        Path("second.yaml").write_text(recipe)
        second = run_command("train", "second.yaml", "--out", "second")
        assert second.code == 0, second.err
        assert "starts at step 3" in second.out
        found, expected = load_model("second/model"), load_model("ladder/model")
        assert found.config == expected.config
        for name, tensor in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), name

    def test_copies_of_a_checkpoint_carry_moments_for_every_parameter(
        self, run_command: Callable[..., Any]
    ) -> None:
        Path("tiny.yaml").write_text(RECIPE + "steps: 2\n")
        assert run_command("train", "tiny.yaml", "--out", "run").code == 0
        source = "run/checkpoints/step-00000002"
        done = run_command("grow", source, "--out", "grown", "--factor", 2, "--init", "copies")
        assert done.code == 0, done.err
        checkpoint = read_checkpoint("grown")
        assert checkpoint.moments.keys() == dict(checkpoint.model.named_parameters()).keys()
        done = run_command("grow", "run/checkpoints/step-00000009", "--out", "x", "--factor", 2)
        assert done.code == 2
        assert "no such directory" in done.err

    def test_a_disk_error_leaves_nothing(
        self, run_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def disk_full(*_arguments: object, **_options: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", disk_full)
        done = run_command("grow", "small", "--out", "large", "--factor", 2)
        assert done.code == 2
        assert "large: could not be written (No space left on device)" in done.err
        assert sorted(path.name for path in Path().iterdir()) == ["data", "small", "text.txt"]
