"""``tokenformer generate``."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenformer.errors import TokenFormerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from tokenformer.generation.engine import GenerationStep
    from tokenformer.language.tokenizers import Tokenizer

_EXAMPLES = """
**Examples**

`tokenformer generate runs/first --prompt "def main():"`

`tokenformer generate models/150m --prompt "Once upon" --temperature 0 --max-new-tokens 50`

`tokenformer generate models/150m --prompt "One" --prompt "Two" --top-p 0.9 --seed 7`

`tokenformer generate models/150m --adapter runs/shakespeare --prompt "ROMEO:"`

`tokenformer generate models/1.5b --prompt "Once upon" --dtype bfloat16 --quantize int8`

`tokenformer generate models/150m --prompt-file chapter.txt --truncate-prompt`
"""


class _Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class _Quantization(StrEnum):
    int8 = "int8"


def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory, or a run directory.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="The text to continue; may be given more than once.", show_default=False
        ),
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="A text file to continue, to its last character.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="An adapter of the model, or its run directory; may be given more than once.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="The most tokens to add.")] = 128,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="Divides the logits; 0 takes the likeliest token.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Keep the likeliest tokens that together reach probability p."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Keep tokens at least this times as likely as the likeliest."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Prompt number i (from 0) draws with seed + i.")] = 0,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[
        _Dtype, typer.Option(help="What the weights are converted to; auto: as they are stored.")
    ] = _Dtype.auto,
    quantize: Annotated[
        _Quantization | None,
        typer.Option(
            help="Round the weights to 8 bits: faster on a GPU, at a small loss of quality.",
            show_default=False,
        ),
    ] = None,
    truncate_prompt: Annotated[
        bool, typer.Option("--truncate-prompt", help="Keep the last tokens of a prompt that does not fit.")
    ] = False,
) -> None:
    """Continue text. One prompt is streamed as it is written; several are printed one after another."""
    from tokenformer.files import read_text
    from tokenformer.generation.config import SamplingConfig
    from tokenformer.generation.context import fit_prompts
    from tokenformer.models.paths import resolve_model_directory
    from tokenformer.models.registry import load_config
    from tokenformer.validation import validate

    values = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    sampling = validate(SamplingConfig, values, source="generate")
    texts = [*(prompt or []), *(read_text(file, "a prompt") for file in prompt_file or [])]
    if not texts:
        raise TokenFormerError("generate: nothing to continue; expected --prompt TEXT or --prompt-file FILE")
    directory = resolve_model_directory(model)
    config = load_config(directory)
    tokenizer = _load_tokenizer(directory, config.vocab_size)
    prompts = [tokenizer.encode(text) or [tokenizer.eos_token_id] for text in texts]
    context = config.max_position_embeddings
    kept = fit_prompts(prompts, context=context, max_new_tokens=max_new_tokens, truncate=truncate_prompt)

    from tokenformer.adapters.apply import load_with_adapters
    from tokenformer.generation.engine import generate_stream
    from tokenformer.models.quantize import quantize_model
    from tokenformer.train.device import find_device

    loaded = load_with_adapters(
        directory, adapter or [], device=find_device(device), dtype=_torch_dtype(dtype)
    )
    if quantize is _Quantization.int8:
        quantize_model(loaded, "int8")
    _note_limits(prompts, kept, max_new_tokens, context)
    steps = generate_stream(
        loaded,
        kept,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=tokenizer.vocab_size,
    )
    if len(texts) == 1:
        _print_streaming(texts[0], steps, tokenizer)
    else:
        _print_together(texts, steps, max_new_tokens, tokenizer)


def _torch_dtype(dtype: _Dtype) -> torch.dtype | None:
    import torch

    return None if dtype is _Dtype.auto else getattr(torch, dtype.value)


def _load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    from tokenformer.language.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > vocab_size:
        raise TokenFormerError(
            f"{directory / 'tokenizer.json'}: has {tokenizer.vocab_size} ids, "
            f"but the model's vocab_size is {vocab_size}"
        )
    return tokenizer


def _note_limits(prompts: list[list[int]], kept: list[list[int]], max_new_tokens: int, context: int) -> None:
    """Say beforehand, on standard error, what will not be as asked."""
    from tokenformer.generation.context import new_token_limits

    limits = new_token_limits(kept, context=context, max_new_tokens=max_new_tokens)
    for number, (prompt, rest, limit) in enumerate(zip(prompts, kept, limits, strict=True), 1):
        if len(rest) < len(prompt):
            print(
                f"note: prompt {number}: only its last {len(rest)} of {len(prompt)} tokens are read",
                file=sys.stderr,
            )
        if limit < max_new_tokens:
            print(
                f"note: prompt {number}: at most {limit} new tokens: with its {len(rest)} they fill the model's "
                f"context of {context}",
                file=sys.stderr,
            )


def _print_streaming(prompt: str, steps: Iterator[GenerationStep], tokenizer: Tokenizer) -> None:
    _echo_prompt(prompt)
    stream = tokenizer.stream()
    for step in steps:
        token = step.tokens[0]
        if token is not None:
            _write(_shown(stream.add(token)))
    _write(_shown(stream.finish()) + "\n")


def _print_together(
    prompts: list[str], steps: Iterator[GenerationStep], max_new_tokens: int, tokenizer: Tokenizer
) -> None:
    from tokenformer.progress import progress_bar

    new: list[list[int]] = [[] for _ in prompts]
    with progress_bar("Generating", max_new_tokens, "tokens") as bar:
        for step in steps:
            for ids, token in zip(new, step.tokens, strict=True):
                if token is not None:
                    ids.append(token)
            bar.advance()
    for number, (prompt, ids) in enumerate(zip(prompts, new, strict=True), 1):
        _write(f"--- {number} of {len(prompts)} ---\n")
        _echo_prompt(prompt)
        _write(_shown(tokenizer.decode(ids)) + "\n")


def _echo_prompt(prompt: str) -> None:
    """Dim on a terminal, to tell it from what the model adds."""
    _write(typer.style(prompt, dim=True) if sys.stdout.isatty() else prompt)


def _shown(text: str) -> str:
    """Generated text; on a terminal without control characters, which could take it over."""
    if not sys.stdout.isatty():
        return text
    return "".join("\ufffd" if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 else c for c in text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("generate", epilog=_EXAMPLES)(generate)
