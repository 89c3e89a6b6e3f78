"""Our models under lm-evaluation-harness: against plain loops and against its own Hugging Face model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM

from tokenformer.errors import TokenFormerError
from tokenformer.evaluation.harness.encoding import encode_pairs
from tokenformer.evaluation.harness.model import TokenFormerLM
from tokenformer.evaluation.harness.run import evaluate_tasks
from tokenformer.interop.gpt_neox import native_to_gpt_neox
from tokenformer.language.tokenizers import load_tokenizer, train_bpe
from tokenformer.models.directory import load_model, save_model
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig

SENTENCES = [
    "The quick brown fox jumps over the lazy dog",
    "A model grows by appending parameter tokens to every layer",
    "Größer ist nicht immer besser, but it often is",
    "She opened the door and saw the sea",
    "One two three four five six seven",
]
CONTEXT = 24


@pytest.fixture(autouse=True)
def _no_caches_elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_bpe(SENTENCES * 5, 320)
    config = TransformerConfig(
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
    )
    model = build_model(config, seed=2)
    with torch.no_grad():
        model.head.weight.mul_(4)  # type: ignore[operator, union-attr]  # predictions that differ
    return save_model(model, tmp_path_factory.mktemp("harness") / "model", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def tokenformer(transformer: Path) -> Path:
    config = TokenFormerConfig(
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        qkv_param_tokens=24,
        proj_param_tokens=16,
        ffn_param_tokens=40,
        max_position_embeddings=CONTEXT,
    )
    model = build_model(config, seed=2)
    return save_model(model, transformer.with_name("tokenformer"), tokenizer=load_tokenizer(transformer))


@pytest.fixture(scope="module")
def reference(transformer: Path) -> HFLM:
    """The harness's own model over the same weights, as a GPT-NeoX directory."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    native_to_gpt_neox(transformer, transformer.with_name("neox"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(transformer / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    model = AutoModelForCausalLM.from_pretrained(transformer.with_name("neox")).eval()
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=CONTEXT)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]  # type: ignore[arg-type]


PAIRS = [
    *((" ".join(text.split()[:-1]), " " + text.split()[-1]) for text in SENTENCES),
    ("", "The quick"),
    ("A long context that does not fit " * 4, " at all"),
    ("trailing space ", "moves"),
    (SENTENCES[0], " a"),
    (SENTENCES[0], " b"),
]


def test_likelihoods_are_those_of_the_harness_s_own_model(transformer: Path, reference: HFLM) -> None:
    asked = requests("loglikelihood", *PAIRS)
    expected = reference.loglikelihood(asked)
    for batch_size in (1, 3, "auto"):
        found = TokenFormerLM(transformer, batch_size=batch_size, device="cpu").loglikelihood(asked)
        assert [answer[1] for answer in found] == [answer[1] for answer in expected]
        assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in expected], abs=1e-4)


def test_texts_encoded_together_are_those_encoded_one_by_one(tokenformer: Path) -> None:
    model = TokenFormerLM(tokenformer, device="cpu")
    pairs = [*PAIRS, ("over<|endoftext|>", " and on"), ("", "<|endoftext|>after"), ("two  ", "spaces")]
    found = encode_pairs(model.text_tokenizer, pairs, prefix_token=model.prefix_token_id)
    seen: list[tuple] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenFormerLM, "_loglikelihood_tokens", lambda self, asked, **_: seen.extend(asked))
        TemplateLM.loglikelihood(model, requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [tuple(map(list, tokens)) for tokens in found] == [(asked[1], asked[2]) for asked in seen]
    (blank,) = encode_pairs(model.text_tokenizer, [("  ", "a")], prefix_token=7)
    assert tuple(map(list, blank)) == ([7], model.tok_encode("  a"))


def test_rolling_likelihoods_too(transformer: Path, reference: HFLM) -> None:
    texts = [(text,) for text in (*SENTENCES, " ".join(SENTENCES * 3), "a")]
    asked = requests("loglikelihood_rolling", *texts)
    found = TokenFormerLM(transformer, device="cpu").loglikelihood_rolling(asked)
    assert found == pytest.approx(reference.loglikelihood_rolling(asked), abs=1e-4)


@pytest.mark.parametrize(
    "settings", [{"until": ["e"]}, {"until": ["\n", "er"], "max_gen_toks": 9}, {"until": []}]
)
def test_generated_texts_too(transformer: Path, reference: HFLM, settings: dict) -> None:
    settings = {"max_gen_toks": 6, "do_sample": False} | settings
    asked = requests("generate_until", *((text, settings) for text in SENTENCES))
    found = TokenFormerLM(transformer, batch_size=2, device="cpu").generate_until(asked)
    assert found == reference.generate_until(asked)


def test_a_tokenformer_against_a_plain_loop(tokenformer: Path) -> None:
    model, tokenizer = load_model(tokenformer).double(), load_tokenizer(tokenformer)
    found = TokenFormerLM(tokenformer, device="cpu").loglikelihood(requests("loglikelihood", *PAIRS[:5]))
    for (context, rest), (nats, _) in zip(PAIRS[:5], found, strict=True):
        ids, scored = tokenizer.encode(context + rest), len(tokenizer.encode(rest))
        ids = ids[-CONTEXT - 1 :]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(
            log_probabilities[place - 1, ids[place]].item() for place in range(len(ids) - scored, len(ids))
        )
        assert nats == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lambada") / "passages.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES), encoding="utf-8")
    return path


def test_lambada_from_a_local_file(tokenformer: Path, passages: Path) -> None:
    result = evaluate_tasks(tokenformer, [f"lambada_jsonl={passages}"], device="cpu")
    assert result is not None
    pairs = requests("loglikelihood", *PAIRS[:5])
    answers = TokenFormerLM(tokenformer, device="cpu").loglikelihood(pairs)
    measures = {score.metric: score.value for score in result.scores}
    assert measures["perplexity"] == pytest.approx(math.exp(-sum(a[0] for a in answers) / 5), rel=1e-5)
    assert measures["acc"] == sum(a[1] for a in answers) / 5
    written = result.to_json()
    assert written["results"]["lambada_jsonl"]["samples"] == 5
    assert (written["dtype"], written["batch_size"]) == ("float32", "auto")
    assert len(written["model_sha256"]) == 64
    assert written["harness_version"]


def test_task_files_of_one_s_own(tokenformer: Path, passages: Path, tmp_path: Path, run_command) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        f"""
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {passages}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["no", "yes"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3.0}}
"""
    )
    output = tmp_path / "result.json"
    done = run_command(
        "evaluate", tokenformer, "--tasks", "mine", "--include-path", folder, "--limit", 3, "--json", output
    )
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert "mine" in done.out
    found = json.loads(output.read_text())["results"]["mine"]
    assert (found["version"], found["samples"]) == ("3.0", 3)
    assert 0 <= found["acc"] <= 1


def test_groups_of_tasks_and_examples_before_a_question(
    tokenformer: Path, passages: Path, tmp_path: Path
) -> None:
    for name, fixed in (("first", ""), ("second", "num_fewshot: 0")):
        (tmp_path / f"{name}.yaml").write_text(
            f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {passages}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["no", "yes"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
{fixed}
"""
        )
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [first, second]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    result = evaluate_tasks(tokenformer, ["both"], include_paths=[tmp_path], num_fewshot=2, device="cpu")
    assert result is not None
    scores = {score.task: score for score in result.scores}
    assert {name: score.num_fewshot for name, score in scores.items()} == {
        "both": None,
        "first": 2,
        "second": 0,
    }
    assert scores["both"].value == pytest.approx((scores["first"].value + scores["second"].value) / 2)


def test_wrong_input(tokenformer: Path, passages: Path, tmp_path: Path, run_command) -> None:
    def fails(*arguments: object) -> str:
        done = run_command("evaluate", tokenformer, *arguments)
        assert (done.code, done.out) == (2, "")
        assert "Traceback" not in done.err
        return done.err

    assert "neither of --data DIR and --tasks NAMES" in fails()
    assert "both of --data DIR" in fails("--data", tmp_path, "--tasks", "piqa")
    assert "--split: has no meaning with --tasks" in fails("--tasks", "piqa", "--split", "train")
    assert "--limit: has no meaning with --data" in fails("--data", tmp_path, "--limit", 3)
    assert "absent.jsonl: no such file" in fails("--tasks", "lambada_jsonl=absent.jsonl")
    assert "did you mean 'lambada_jsonl'" in fails("--tasks", f"lambada_json={passages}")
    assert "absent: no such folder" in fails("--tasks", "x", "--include-path", tmp_path / "absent")
    assert "dtype: found 'int8'" in fails("--tasks", f"lambada_jsonl={passages}", "--dtype", "int8")
    too_long = ["--sequence-length", CONTEXT + 1]
    assert "max_length: found 25" in fails("--tasks", f"lambada_jsonl={passages}", *too_long)


@pytest.mark.slow
def test_an_unknown_task_names_the_nearest(tokenformer: Path) -> None:
    with pytest.raises(TokenFormerError, match=r"'helaswag' is no task.*did you mean 'hellaswag'"):
        evaluate_tasks(tokenformer, ["helaswag"], device="cpu")


def test_a_dataset_out_of_reach(tokenformer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(
        TokenFormerError, match=r"piqa: the data could not be loaded .*Couldn't reach.*--include-path"
    ):
        evaluate_tasks(tokenformer, ["piqa"], device="cpu")


def test_damaged_weights_are_said(tokenformer: Path, passages: Path, tmp_path: Path) -> None:
    model = load_model(tokenformer)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))  # type: ignore[operator, union-attr]
    damaged = save_model(model, tmp_path / "model", tokenizer=load_tokenizer(tokenformer))
    with pytest.raises(TokenFormerError, match="not a number; the model's weights may be damaged"):
        evaluate_tasks(damaged, [f"lambada_jsonl={passages}"], device="cpu")


def test_a_model_without_tokenizer(make_tokenformer, passages: Path, tmp_path: Path) -> None:
    model = save_model(make_tokenformer(), tmp_path / "model")
    with pytest.raises(TokenFormerError, match=r"has no tokenizer\.json"):
        evaluate_tasks(model, [f"lambada_jsonl={passages}"])


@pytest.mark.slow
def test_the_harness_s_own_command_knows_the_model(tokenformer: Path, passages: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        (Path(sys.modules[TokenFormerLM.__module__].__file__).parent / "tasks" / "lambada_jsonl.yaml")  # type: ignore[arg-type]
        .read_text()
        .replace(
            "dataset_path: json", f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {passages}}}}}"
        )
    )
    command = [sys.executable, "-m", "tokenformer.lm_eval", "run", "--model", "tokenformer"]
    options = [
        "--model_args",
        f"path={tokenformer}",
        "--device",
        "cpu",
        "--tasks",
        str(tmp_path / "mine.yaml"),
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lambada_jsonl" in done.stdout


@pytest.mark.slow
def test_several_processes_give_the_same_scores(
    tokenformer: Path, passages: Path, tmp_path: Path, torchrun, run_command
) -> None:
    options = ("evaluate", tokenformer, "--tasks", f"lambada_jsonl={passages}", "--device", "cpu", "--json")
    assert run_command(*options, tmp_path / "one").code == 0
    done = torchrun(2, "-m", "tokenformer", *options, tmp_path / "two")
    assert done.code == 0, done.err
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert two["processes"] == 2
    assert two["results"]["lambada_jsonl"]["samples"] == 5
    for metric in ("perplexity", "acc"):
        expected = one["results"]["lambada_jsonl"][metric]
        assert two["results"]["lambada_jsonl"][metric] == pytest.approx(expected, rel=1e-9)
