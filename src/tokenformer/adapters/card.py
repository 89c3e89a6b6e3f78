"""The model card of an adapter directory."""

from __future__ import annotations

from collections.abc import Mapping

from tokenformer.adapters.config import AdapterConfig
from tokenformer.models.card import facts_table


def adapter_card(config: AdapterConfig, facts: Mapping[str, Mapping[str, object]] | None = None) -> str:
    """Markdown with a Hugging Face header.

    Args:
        config: the adapter.
        facts: further sections, title -> name -> value.
    """
    base, added = config.base, config.param_tokens
    adapter = {
        "parameters": config.num_parameters(),
        "parameter tokens added (qkv / proj / ffn)": f"{added.qkv} / {added.proj} / {added.ffn}",
        "weight function": f"`{base.config.norm_activation}`",
        "base": base.name,
        "parameters of the base": base.config.num_parameters(),
        "SHA-256 of the base's weights": f"`{base.weights_sha256}`",
    }
    lines = ["---", "library_name: tokenformer", "tags: [tokenformer, adapter]", "---", ""]
    lines += [f"# {config.name}: an adapter of {base.name}", "", *facts_table("Adapter", adapter)]
    for title, values in (facts or {}).items():
        lines += facts_table(title, values)
    lines += [
        "Parameter tokens to append to the layers of the base. Load them with "
        "`tokenformer.load_adapter(tokenformer.load_model(base), path)`, or name them as `--adapter` beside the base.",
        "",
    ]
    return "\n".join(lines)
