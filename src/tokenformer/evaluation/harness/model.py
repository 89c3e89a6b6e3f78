"""Our models as an lm-evaluation-harness model: registered there as ``tokenformer``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from tokenformer.adapters.apply import load_with_adapters
from tokenformer.errors import TokenFormerError
from tokenformer.evaluation.harness.encoding import encode_pairs
from tokenformer.evaluation.harness.stopping import generate_until_stopped
from tokenformer.evaluation.likelihood import Continuation, Ids, Likelihood, log_likelihoods
from tokenformer.generation.config import SamplingConfig
from tokenformer.language.tokenizers import load_tokenizer
from tokenformer.models.paths import resolve_model_directory
from tokenformer.progress import progress_bar

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
_NEW_TOKENS = 256  # the harness's own default


@register_model("tokenformer")
class TokenFormerLM(TemplateLM):
    """A model directory for the harness.

    Args:
        path: a model directory with a tokenizer, or a run directory.
        device: where it runs; ``auto`` takes CUDA where there is one.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        batch_size: sequences at a time, or ``auto``: as many as make up a good number of tokens. A score does not
            depend on it but for rounding.
        max_length: tokens the model may see; by default its context.
        adapter: an adapter of the model, or several, as paths with ``;`` between or as a sequence.
        max_batch_size: taken because the harness passes it; an automatic batch needs no bound.

    Under torchrun each process scores a share of the requests; the harness puts the shares together.

    Raises:
        TokenFormerError: no model or tokenizer there, an unknown dtype, a batch size or length out of range.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | None = "auto",
        dtype: str = "auto",
        batch_size: int | str | None = "auto",
        max_length: int | None = None,
        adapter: str | Sequence[str | Path] = (),
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.path = resolve_model_directory(path)
        if not (self.path / "tokenizer.json").is_file():
            raise TokenFormerError(f"{self.path}: has no tokenizer.json, which tasks of text need")
        if dtype != "auto" and dtype not in DTYPES:
            raise TokenFormerError(f"dtype: found '{dtype}', expected auto, {', '.join(DTYPES)}")
        self._join_ranks()
        self._device = _find_device(device, self._local_rank)
        self.text_tokenizer = load_tokenizer(self.path)
        self.adapters = adapter.split(";") if isinstance(adapter, str) else list(adapter)
        self.model = load_with_adapters(
            self.path, self.adapters, device=self._device, dtype=DTYPES.get(dtype)
        )
        self.dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        self.batch_size = _check_batch_size(batch_size)
        context = self.model.config.max_position_embeddings
        self.max_length = context if max_length is None else int(max_length)
        if not 1 <= self.max_length <= context:
            raise TokenFormerError(
                f"max_length: found {max_length}, expected 1 to {context}, the model's context"
            )

    def _join_ranks(self) -> None:
        self._local_rank = 0
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            dist.init_process_group("gloo")  # for scores alone, which lie in main memory
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
            self._local_rank = dist.get_node_local_rank(fallback_rank=self._rank)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """One after the other, what the processes give (tensors of one shape, in main memory)."""
        if self.world_size == 1:
            return tensor
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(found, tensor)
        return torch.cat([torch.atleast_1d(part) for part in found])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """What the processes give, in their order, on process ``dst``; None on the others."""
        if self.world_size == 1:
            return [obj]
        found = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, found, dst=dst)
        return found

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.world_size > 1:
            dist.barrier()

    @property
    def device(self) -> torch.device:
        """Where the harness puts what it gathers: counts, in main memory."""
        return torch.device("cpu")

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_ignored: Any) -> list[int]:
        """Ids of ``string``; special tokens spelled in it are read as such, as Hugging Face tokenizers do."""
        return self.text_tokenizer.encode(string, allow_special=True)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As :class:`~lm_eval.api.model.TemplateLM` has it, with all texts encoded together."""
        pairs = [request.args for request in requests]
        encoded = encode_pairs(self.text_tokenizer, pairs, prefix_token=self.prefix_token_id)
        asked = [(pair, *tokens) for pair, tokens in zip(pairs, encoded, strict=True)]
        return self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Ids, Ids]],
        disable_tqdm: bool = False,
        **_ignored: Any,
    ) -> list[tuple[float, bool]]:
        found = self._score([Continuation(context, tokens) for _, context, tokens in requests], "requests")
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(answer))
        return [(answer.nats, answer.greedy) for answer in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each text by itself, in disjoint windows as wide as the context, the first after the end-of-document id."""
        windows: list[Continuation] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append(Continuation(*make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, answer in zip(owners, self._score(windows, "windows"), strict=True):
            totals[number] += answer.nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop sequence of each request, the end-of-document token among them."""
        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda number: repr(requests[number].args[1]))
        with self._bar("generating", len(requests), "texts") as advance:
            for _, same in groupby(order, key=lambda number: repr(requests[number].args[1])):
                numbers = list(same)
                settings = requests[numbers[0]].args[1]
                for start in range(0, len(numbers), self._generated_at_once):
                    chosen = numbers[start : start + self._generated_at_once]
                    found = self._generate([requests[number].args[0] for number in chosen], settings)
                    for number, text in zip(chosen, found, strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    advance(len(chosen))
        return texts

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        options = dict(normalize_gen_kwargs(dict(settings), _NEW_TOKENS))
        end = self.text_tokenizer.eos_token
        stops = handle_stop_sequences(options.get("until"), eos=end)
        new_tokens = int(options["max_gen_toks"])
        if new_tokens >= self.max_length:
            raise TokenFormerError(
                f"max_gen_toks: the task asks for {new_tokens} new tokens, expected fewer than the "
                f"{self.max_length} tokens that the model may see"
            )
        prompts = [self.tok_encode(context)[-(self.max_length - new_tokens) :] for context in contexts]
        filters = {name: options[name] for name in ("top_k", "top_p", "min_p") if options.get(name)}
        sampling = SamplingConfig(temperature=float(options.get("temperature") or 0.0), **filters)
        return generate_until_stopped(
            self.model,
            self.text_tokenizer,
            prompts,
            stops=[stop for stop in stops if stop],
            max_new_tokens=new_tokens,
            sampling=sampling,
        )

    @property
    def _generated_at_once(self) -> int:
        return self.batch_size or max(1, self._batch_tokens // self.max_length)

    @property
    def _batch_tokens(self) -> int:
        return _BATCH_TOKENS.get(self._device.type, _BATCH_TOKENS["cpu"])

    def _score(self, requests: Sequence[Continuation], unit: str) -> list[Likelihood]:
        with self._bar("scoring", len(requests), unit) as advance:
            return log_likelihoods(
                self.model,
                requests,
                max_length=self.max_length,
                batch_tokens=self._batch_tokens,
                batch_size=self.batch_size,
                on_done=advance,
            )

    def _bar(self, title: str, total: int, unit: str) -> Any:
        if self.rank:
            return nullcontext(_nothing)
        return _Advance(title, total, unit)


class _Advance:
    """A progress bar as the function that advances it."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._bar = progress_bar(title, total, unit)

    def __enter__(self) -> Callable[[int], None]:
        return self._bar.__enter__().advance

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)


def _nothing(amount: int) -> None:
    pass


def _find_device(name: str | None, local_rank: int) -> torch.device:
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device(str(name))


def _check_batch_size(batch_size: int | str | None) -> int | None:
    """A number of sequences, or None for an automatic one."""
    text = str(batch_size)
    if text in ("None", "auto") or text.startswith("auto:"):
        return None
    if not text.isdecimal() or int(text) < 1:
        raise TokenFormerError(f"batch_size: found {batch_size}, expected a positive number or auto")
    return int(text)
