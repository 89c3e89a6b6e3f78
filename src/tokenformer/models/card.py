"""The model card of a model directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from tokenformer.models.config import DecoderConfig
from tokenformer.models.tokenformer.config import TokenFormerConfig

_LOADING = {
    "tokenformer": "Load it with `tokenformer.load_model(path)`, or with `AutoModelForCausalLM.from_pretrained(path)` "
    "of transformers after `import tokenformer.huggingface`.",
    "transformers": "Load it with `AutoModelForCausalLM.from_pretrained(path)` of transformers.",
}


def model_card(
    config: DecoderConfig,
    facts: Mapping[str, Mapping[str, object]] | None = None,
    *,
    library: Literal["tokenformer", "transformers"] = "tokenformer",
    license: str | None = None,
) -> str:
    """Markdown with a Hugging Face header.

    Args:
        config: the model.
        facts: further sections, title -> name -> value, e.g. ``{"Training": {"steps": 1000}}``.
        library: whose format the directory has.
        license: its identifier on the hub, e.g. ``apache-2.0``, where it is known.
    """
    lines = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        f"tags: [{config.architecture}]",
        *([f"license: {license}"] if license else []),
        "---",
        "",
        f"# {config.class_name}, {config.num_parameters():,} parameters",
        "",
    ]
    model = {
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "attention heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
    }
    lines += facts_table("Model", model)
    if isinstance(config, TokenFormerConfig):
        lines += _growth(config)
    for title, values in (facts or {}).items():
        lines += facts_table(title, values)
    lines += [_LOADING[library], ""]
    return "\n".join(lines)


def card_license(text: str) -> str | None:
    """The license that the header of a model card names, if any."""
    header = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    found = re.search(r"^license: *([\w.-]+) *$", header[1], flags=re.MULTILINE) if header else None
    return found[1] if found else None


def facts_table(title: str, values: Mapping[str, object]) -> list[str]:
    """Lines of a section of a card: name -> value."""
    rows = [
        f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value} |"
        for name, value in values.items()
    ]
    return [f"## {title}", "", "| | |", "| --- | --- |", *rows, ""]


def _growth(config: TokenFormerConfig) -> list[str]:
    lines = ["## Parameter tokens", "", f"Weight function `{config.norm_activation}`.", ""]
    lines += ["| role | tokens | groups | tau |", "| --- | --- | --- | --- |"]
    for role in ("qkv", "proj", "ffn"):
        groups = " + ".join(str(n) for n in config.groups(role))
        lines.append(f"| {role} | {config.param_tokens(role)} | {groups} | {getattr(config.tau, role):g} |")
    lines.append("")
    for number, step in enumerate(config.growth_history, 1):
        when = "" if step.step is None else f" after {step.step:,} steps"
        lines.append(
            f"{number}. Grown{when} (`{step.init}`{step.note}) to {step.qkv_param_tokens} / {step.proj_param_tokens} / "
            f"{step.ffn_param_tokens} tokens (qkv / proj / ffn)."
        )
    return [*lines, ""] if config.growth_history else lines
