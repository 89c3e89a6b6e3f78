"""Our classes in transformers' ``Auto`` classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tokenformer.huggingface.modeling import TokenFormerForCausalLM, TransformerForCausalLM


def register() -> None:
    """Let ``AutoConfig``, ``AutoModelForCausalLM`` and ``AutoTokenizer`` find our architectures; done once or again."""
    for model in (TokenFormerForCausalLM, TransformerForCausalLM):
        config = model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        AutoTokenizer.register(config, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
