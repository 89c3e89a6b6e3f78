"""Model directories through transformers' Auto classes, and what save_pretrained and push_to_hub write."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import tokenformer.huggingface
from tokenformer.errors import TokenFormerError
from tokenformer.growth.grow import grow
from tokenformer.huggingface import TokenFormerForCausalLM, TokenFormerPretrainedConfig
from tokenformer.language.tokenizers import ByteTokenizer, load_tokenizer
from tokenformer.models.base import LanguageModel
from tokenformer.models.directory import load_model
from tokenformer.models.registry import load_config

TOKENS = torch.tensor([[5, 200, 0, 39, 12], [7, 8, 9, 10, 11]])


def test_the_auto_classes_load_what_we_save(
    kind: str, models: dict[str, LanguageModel], directories: dict[str, Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(directories[kind])
    name = "TransformerForCausalLM" if kind == "transformer" else "TokenFormerForCausalLM"
    assert type(model) is getattr(tokenformer.huggingface, name)
    config = AutoConfig.from_pretrained(directories[kind])
    assert config.native() == models[kind].config == model.language_model.config
    assert not model.training
    expected = models[kind].state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, models[kind](TOKENS).logits)


def test_the_files_of_auto_map_import_the_installed_classes(
    kind: str, directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    for auto, place in json.loads((directories[kind] / "config.json").read_text())["auto_map"].items():
        found = get_class_from_dynamic_module(place, str(directories[kind]))
        assert found is getattr(tokenformer.huggingface, place.split(".")[1])
        assert auto in ("AutoConfig", "AutoModelForCausalLM")


@pytest.mark.slow
def test_without_our_import_through_auto_map(directories: dict[str, Path], tmp_path: Path) -> None:
    """In a fresh interpreter; nothing of ours is imported before transformers does it."""
    code = (
        "import json, sys, torch, transformers\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "path = sys.argv[1]\n"
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)\n"
        "ids = AutoTokenizer.from_pretrained(path)('abc', return_tensors='pt').input_ids\n"
        "print(json.dumps([type(model).__module__, model(ids).logits[0, -1, :3].tolist()]))\n"
        "model.save_pretrained(sys.argv[2])\n"
    )
    arguments = [sys.executable, "-c", code, str(directories["grown"]), str(tmp_path / "saved")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    module, logits = json.loads(done.stdout.splitlines()[-1])
    assert module == "tokenformer.huggingface.modeling"
    with torch.no_grad():
        expected = load_model(directories["grown"])(torch.tensor([[97, 98, 99]])).logits[0, -1, :3]
    torch.testing.assert_close(torch.tensor(logits), expected)
    sources = {path.name: path.read_text() for path in (tmp_path / "saved").glob("*.py")}
    assert sorted(sources) == ["configuration_tokenformer.py", "modeling_tokenformer.py"]
    assert all(text.startswith("from tokenformer.huggingface import") for text in sources.values())


def test_the_tokenizer(directories: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directories["tokenformer"])
    assert tokenizer("héllo").input_ids == ByteTokenizer().encode("héllo")
    assert tokenizer.decode(tokenizer("héllo w").input_ids) == "héllo w"
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (256, 64)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).eos_token_id == 256
    (tmp_path / "plain").mkdir()
    shutil.copyfile(directories["tokenformer"] / "tokenizer.json", tmp_path / "plain" / "tokenizer.json")
    shutil.copyfile(directories["tokenformer"] / "config.json", tmp_path / "plain" / "config.json")
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("a").input_ids == [97]


def test_what_save_pretrained_writes_is_a_model_directory(
    kind: str, models: dict[str, LanguageModel], directories: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(directories[kind])
    model.save_pretrained(tmp_path / "saved")
    assert load_config(tmp_path / "saved") == models[kind].config
    again = load_model(tmp_path / "saved")
    expected = models[kind].state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("tokenformer", "text-generation")
    assert "`save_pretrained` of transformers" in card.text
    generation = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(257, 384))


def test_a_license_goes_on(directories: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(directories["grown"], tmp_path / "licensed")
    readme = tmp_path / "licensed" / "README.md"
    readme.write_text(readme.read_text().replace("---\n", "---\nlicense: mit\n", 1))
    AutoModelForCausalLM.from_pretrained(tmp_path / "licensed").save_pretrained(tmp_path / "saved")
    assert ModelCard.load(tmp_path / "saved" / "README.md").data.license == "mit"


def test_a_card_that_is_there_stays(directories: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    AutoModelForCausalLM.from_pretrained(directories["grown"]).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_a_model_made_from_a_configuration_can_grow_and_travel(tmp_path: Path) -> None:
    config = TokenFormerPretrainedConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        qkv_param_tokens=4,
        proj_param_tokens=4,
        ffn_param_tokens=8,
    )
    assert config.tau == {"qkv": 4.0, "proj": 4.0, "ffn": 8.0}
    torch.manual_seed(0)
    model = TokenFormerForCausalLM(config)
    keys = model.language_model.blocks[0].ffn.key_tokens[0]  # type: ignore[index, union-attr]
    assert keys.std().item() == pytest.approx(16**-0.5, rel=0.2)  # our own fan_in initialisation
    config.layer_norm_eps = 1e-3
    config.num_attention_heads = 3
    with pytest.raises(TokenFormerError, match="num_attention_heads 3 does not divide hidden_size 16"):
        model.save_pretrained(tmp_path / "wrong")
    config.num_attention_heads = 2
    model.save_pretrained(tmp_path / "model")
    larger = grow(load_model(tmp_path / "model"), factor=2)
    assert larger.config.num_parameters() > config.native().num_parameters()
    with pytest.raises(TokenFormerError, match="hidden_size: missing"):
        TokenFormerPretrainedConfig(vocab_size=128)


def test_dtype_and_precision(directories: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directories["grown"], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(tmp_path).embedding.weight.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_shards(directories: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directories["transformer"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.head.weight, model.head.weight)
    assert torch.equal(load_model(tmp_path).head.weight, model.head.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "missing keys: blocks.1.ffn.key_tokens.0"),
        ("unexpected", "unexpected keys: surplus"),
    ],
)
def test_weights_that_do_not_fit(
    change: str, message: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(directories["tokenformer"], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    if change == "missing":
        del weights["blocks.1.ffn.key_tokens.0"]
    else:
        weights["surplus"] = torch.zeros(2)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TokenFormerError, match=r"the weights do not fit config\.json") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert message in str(caught.value)


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What push_to_hub would have sent, file by file; the hub has no card yet."""
    files: dict[str, bytes] = {}

    def create_commit(_: Any, repo_id: str, operations: Any, **__: Any) -> str:
        for operation in operations:
            files[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()
        return f"https://huggingface.co/{repo_id}"

    def no_card(*_: Any, **__: Any) -> Any:
        raise EntryNotFoundError("there is no card yet")

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_repo", lambda _, repo_id, **__: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(ModelCard, "load", no_card)
    return files


def test_push_to_hub(directories: dict[str, Path], uploaded: dict[str, bytes]) -> None:
    model = AutoModelForCausalLM.from_pretrained(directories["grown"])
    model.push_to_hub("owner/name", tags=["mine"])
    assert set(uploaded) == {
        "README.md",
        "config.json",
        "configuration_tokenformer.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_tokenformer.py",
    }
    card = ModelCard(uploaded["README.md"].decode())
    assert (card.data.library_name, card.data.tags) == ("tokenformer", ["tokenformer", "mine"])
    assert "Parameter tokens" in card.text


def test_a_card_on_the_hub_stays(
    directories: dict[str, Path], uploaded: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = "---\nlicense: mit\n---\n# Written by hand\n"
    monkeypatch.setattr(ModelCard, "load", lambda *_, **__: ModelCard(written))
    AutoModelForCausalLM.from_pretrained(directories["grown"]).push_to_hub("owner/name")
    assert uploaded["README.md"].decode() == written


def test_a_model_of_the_hub_by_name(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(directories["grown"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = load_model("owner/name", revision="v1")
    assert model.config == load_config(directories["grown"])
    assert load_tokenizer("owner/name").eos_token_id == 256
    (name, revision, patterns), (_, _, tokenizer_patterns) = asked
    assert (name, revision) == ("owner/name", "v1")
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in patterns)
    assert tokenizer_patterns == ["tokenizer.json", "tokenizer_config.json"]


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TokenFormerError, match="the hub could not be reached") as caught:
        load_model("owner/absent-here")
    assert "there is no directory owner/absent-here here" in str(caught.value)
    assert "hf download owner/absent-here --local-dir DIR" in str(caught.value)
    with pytest.raises(TokenFormerError, match=r"absent-here/config\.json: no such file"):
        load_model(Path("owner/absent-here"))  # a path is never looked for on the hub
    with pytest.raises(TokenFormerError, match=r"revision: 'v1', but .* is no repository of the hub"):
        load_model(tmp_path, revision="v1")


@pytest.mark.parametrize(
    ("name", "message"),
    [("RepositoryNotFoundError", "no such repository, or a private one"), ("GatedRepoError", "asked for")],
)
def test_a_repository_that_is_not_given(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, name)

    def snapshot_download(*_: Any, **__: Any) -> str:
        raise kind.__new__(kind)  # its own constructor wants the answer of a server

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(TokenFormerError, match=message):
        load_model("owner/name")
