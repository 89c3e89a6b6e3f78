"""Our models as models of Hugging Face's transformers. Importing this registers them with its ``Auto`` classes::

    import tokenformer.huggingface
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("models/150m")

Raises:
    TokenFormerError: transformers is not installed.
"""

from __future__ import annotations

try:
    import transformers  # noqa: F401
except ImportError as error:
    from tokenformer.errors import TokenFormerError

    raise TokenFormerError(
        "tokenformer.huggingface needs transformers; install it with: pip install 'tokenformer[hf]'"
    ) from error

from tokenformer.huggingface.configuration import TokenFormerPretrainedConfig, TransformerPretrainedConfig
from tokenformer.huggingface.modeling import TokenFormerForCausalLM, TransformerForCausalLM
from tokenformer.huggingface.registration import register

register()

__all__ = [
    "TokenFormerForCausalLM",
    "TokenFormerPretrainedConfig",
    "TransformerForCausalLM",
    "TransformerPretrainedConfig",
]
