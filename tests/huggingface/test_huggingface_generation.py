"""Generation, pipelines and the Trainer over our models."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache, pipeline

import tokenformer.huggingface  # noqa: F401
from tokenformer import generate
from tokenformer.errors import TokenFormerError
from tokenformer.generation.config import SamplingConfig
from tokenformer.models.base import LanguageModel

NEW = 12
PROMPTS = [[5, 17, 200, 39, 12, 5, 8], [30], [33, 2, 7, 90]]
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture
def model(kind: str, directories: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(directories[kind])


def left_padded(prompts: list[list[int]], filler: int = 77) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = [[filler] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def engine(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    return generate(
        model.language_model, prompts, max_new_tokens=NEW, sampling=GREEDY, eos_token_id=256, vocab_size=257
    )


def without_end(rows: Tensor) -> list[list[int]]:
    return [row[: row.index(256)] if 256 in row else row for row in rows.tolist()]


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_are_those_of_our_engine(model: Any, use_cache: bool) -> None:
    ids, mask = left_padded(PROMPTS)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "use_cache": use_cache}
    batch = model.generate(input_ids=ids, attention_mask=mask, **options)
    expected = engine(model, PROMPTS)
    assert without_end(batch[:, ids.shape[1] :]) == expected
    assert max(max(row) for row in expected) < 257
    assert len({tuple(row) for row in expected}) > 1
    alone = model.generate(input_ids=torch.tensor([PROMPTS[2]]), **options)
    assert without_end(alone[:, len(PROMPTS[2]) :]) == [expected[2]]


def test_beam_search_with_the_cache_is_that_without(model: Any) -> None:
    ids, mask = left_padded(PROMPTS)
    options: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 2, "do_sample": False}
    cached, recomputed = (
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, use_cache=use_cache, **options)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, recomputed)
    greedy = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(cached[::2, : greedy.shape[1]], greedy[:, : cached.shape[1]])


def test_a_cache_is_continued_cropped_and_left_alone(model: Any) -> None:
    ids = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    with torch.no_grad():
        whole = model(ids).logits
        cache = DynamicCache()
        first = model(ids[:, :4], past_key_values=cache).logits
        assert cache.get_seq_length() == 4
        snapshot = copy.deepcopy(cache)
        rest = model(ids[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=0, atol=1e-5)
        cache.crop(-2)
        torch.testing.assert_close(
            model(ids[:, 5:], past_key_values=cache).logits, whole[:, 5:], rtol=0, atol=1e-5
        )
        again = model(ids[:, 4:], past_key_values=snapshot).logits
        torch.testing.assert_close(again, whole[:, 4:], rtol=0, atol=1e-5)


def test_one_step_copies_no_earlier_positions(model: Any) -> None:
    """Buffers have room, and are used again while the cache still holds what they do."""
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([PROMPTS[0]]), past_key_values=cache)
        before = cache.layers[0].keys.data_ptr()
        model(torch.tensor([[3]]), past_key_values=cache)
    assert cache.layers[0].keys.data_ptr() == before
    assert cache.get_seq_length() == len(PROMPTS[0]) + 1


def test_right_padding_changes_nothing(model: Any) -> None:
    prompt = PROMPTS[2]
    ids = torch.tensor([[*prompt, 77, 77]])
    mask = torch.tensor([[1] * len(prompt) + [0, 0]])
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits[:, : len(prompt)]
        torch.testing.assert_close(padded, model(torch.tensor([prompt])).logits, rtol=0, atol=1e-5)


def test_only_the_last_logits(model: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        whole, last = model(ids).logits, model(ids, logits_to_keep=1).logits
    torch.testing.assert_close(last, whole[:, -1:])


def test_the_loss_is_cross_entropy_of_the_next_token(model: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    labels = ids.clone()
    labels[:, 3] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
    kept = torch.tensor([i for i in range(ids.shape[1] - 1) if i + 1 != 3])
    expected = torch.nn.functional.cross_entropy(output.logits[0, kept], ids[0, kept + 1])
    torch.testing.assert_close(output.loss, expected)
    assert output.past_key_values is None
    halved = model(ids, labels=labels, num_items_in_batch=2 * len(kept)).loss
    torch.testing.assert_close(halved, expected / 2)


def test_what_is_refused(model: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    static = StaticCache(config=model.config, max_cache_len=32)
    for arguments, message in [
        ({"output_attentions": True}, "output_attentions: not offered"),
        ({"output_hidden_states": True}, "output_hidden_states: not offered"),
        ({"inputs_embeds": torch.zeros(1, 7, 16)}, "inputs_embeds: not offered"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask: found shape \[1, 3\], expected \[1, 7\]"),
        ({"past_key_values": static}, "past_key_values: found a StaticCache, expected a DynamicCache"),
    ]:
        with pytest.raises(TokenFormerError, match=message):
            model(ids, **arguments)
    with pytest.raises(TokenFormerError, match="input_ids: missing"):
        model()
    with pytest.raises(TokenFormerError, match="the vocabulary is part of the model"):
        model.resize_token_embeddings(500)
    assert model.resize_token_embeddings(384) is model.get_input_embeddings()


def test_the_pipeline(directories: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directories["grown"], padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    write = pipeline("text-generation", model=str(directories["grown"]), tokenizer=tokenizer)
    texts = ["hello", "a longer one"]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    together = write(texts, batch_size=2, **options)
    for text, written in zip(texts, together, strict=True):
        assert written[0]["generated_text"] == write(text, **options)[0]["generated_text"]


def test_the_trainer_trains(
    models: dict[str, LanguageModel], directories: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(directories["grown"])
    rows = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        lr_scheduler_type="constant",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    with torch.no_grad():
        assert not torch.equal(model(rows).logits, models["grown"](rows).logits)
