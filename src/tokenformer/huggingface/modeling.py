"""Our models as transformers' ``PreTrainedModel``: generation, ``pipeline``, ``Trainer``, the hub.

The model is held as it is: its parts are the parts of the wrapper, so tensors have the names they have in a model
directory, and what ``save_pretrained`` writes is one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tokenformer.errors import TokenFormerError
from tokenformer.huggingface.cache import cache_length, state_from_cache, store_state
from tokenformer.huggingface.configuration import (
    NativeConfig,
    TokenFormerPretrainedConfig,
    TransformerPretrainedConfig,
)
from tokenformer.huggingface.directory import keep_card, write_beside
from tokenformer.layers.attention import DecoderState
from tokenformer.models.base import LanguageModel
from tokenformer.models.registry import model_class
from tokenformer.ops.attention import PADDING_DOCUMENT

_LISTED = 6


class _ForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of ours with the calls of transformers.

    Left and right padding, beam search and everything else that works on a ``DynamicCache``. Fresh weights (of a model
    made from a configuration alone) are drawn as its ``initializer`` says.
    """

    config_class: ClassVar[type[NativeConfig]]
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: NativeConfig) -> None:
        super().__init__(config)
        native = config.native()
        model: LanguageModel = model_class(native.architecture)(native)
        self._language_model = (model,)  # in a tuple: its parts are registered here, under their own names
        for name, part in model.named_children():
            self.add_module(name, part)
        self.post_init()

    @property
    def language_model(self) -> LanguageModel:
        """The model as the rest of the library knows it; it shares its parameters with this one."""
        return self._language_model[0]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: [b, t] int64.
            attention_mask: [b, past + t], 0 where a position is padding.
            position_ids: [b, t] int64; by default counted over what is no padding.
            past_key_values: what to continue from; filled in place.
            inputs_embeds: refused.
            labels: [b, t] int64, ids of the same positions (they are shifted here); -100 is left out.
            use_cache: return ``past_key_values``; by default outside training.
            output_attentions: refused.
            output_hidden_states: refused.
            return_dict: False for a tuple.
            cache_position: passed by transformers 4; the length of the cache says the same.
            logits_to_keep: logits of the last positions alone; 0: of all.
            num_items_in_batch: what the summed loss is divided by, instead of the number of labels here.

        Raises:
            TokenFormerError: an argument that is refused, or whose shape is wrong.
        """
        _require_absent(
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        if input_ids is None:
            raise TokenFormerError("input_ids: missing, expected token ids [b, t]")
        if use_cache is None:
            use_cache = past_key_values is not None or (labels is None and not self.training)
        cache = past_key_values if past_key_values is not None or not use_cache else DynamicCache()
        documents = _documents(attention_mask, input_ids, 0 if cache is None else cache_length(cache))
        logits = self._logits(input_ids, position_ids, documents, cache, logits_to_keep or None)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _logits(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        cache: DynamicCache | None,
        logits_to_keep: int | None,
    ) -> Tensor:
        """[b, t, v] or the last positions of it; ``documents`` [b, past + t]; the cache is filled."""
        t = tokens.shape[1]
        if documents is not None and positions is None:
            positions = ((documents != PADDING_DOCUMENT).cumsum(1) - 1).clamp_min(0)[:, -t:]
        state: DecoderState | None = None
        if cache is not None:
            past = None if documents is None else documents[:, :-t]
            state = state_from_cache(cache, tokens.shape[0], len(self.language_model.blocks), past)
        output = self.language_model(
            tokens,
            positions=positions,
            documents=None if documents is None else documents[:, -t:],
            state=state,
            logits_to_keep=logits_to_keep,
        )
        if cache is not None:
            store_state(cache, output.state)
        return output.logits

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise TokenFormerError(
            "the vocabulary is part of the model: its embedding is not exchanged or resized "
            f"(it has {self.config.vocab_size} rows, among them ids beyond the tokenizer's, free for new tokens)"
        )

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.tie_word_embeddings else self.head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> nn.Module:
        """The embedding as it is; another number of rows is refused."""
        if new_num_tokens not in (None, self.config.vocab_size):
            self.set_input_embeddings(self.embedding)
        return self.embedding

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: our models draw their own weights, and :meth:`from_pretrained` refuses files with missing ones."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, but missing, unexpected or misshapen tensors are errors.

        Raises:
            TokenFormerError: the weights do not fit the configuration; each tensor is named.
        """
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        _require_complete(str(pretrained_model_name_or_path), info)
        return (model, info) if wanted else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers; with a model card, unless there is one, and the files that ``auto_map`` names.

        Raises:
            TokenFormerError: an adapter is on top, so that it is not plain which model is meant.
        """
        if self.language_model.adapters:
            raise TokenFormerError(
                "save_pretrained: an adapter is on top of this model; make it a part of the model with "
                "tokenformer.merge_adapters(model.language_model) first, or take it off with remove_adapters"
            )
        self.config.follow(self.language_model.config)
        if Path(save_directory).is_dir() or not Path(save_directory).exists():
            write_beside(self.config, Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        keep_card(self.config, Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing; as in the configuration."""


def _documents(attention_mask: Tensor | None, tokens: Tensor, past: int) -> Tensor | None:
    """0 for text and -1 for padding [b, past + t], or None without padding."""
    if attention_mask is None:
        return None
    expected = (tokens.shape[0], past + tokens.shape[1])
    if tuple(attention_mask.shape) != expected:
        raise TokenFormerError(
            f"attention_mask: found shape {list(attention_mask.shape)}, expected {list(expected)}: a batch of "
            "rows, one entry for each position so far"
        )
    if bool(attention_mask.all()):
        return None
    return torch.where(attention_mask.bool(), 0, PADDING_DOCUMENT)


def _require_absent(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise TokenFormerError(f"{name}: not offered by this model; leave it out")


def _require_complete(source: str, info: dict[str, Any]) -> None:
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(map(str, info.get(kind) or ()))
        if found:
            more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            problems.append(f"{kind.replace('_', ' ')}: {', '.join(found[:_LISTED])}{more}")
    if problems:
        raise TokenFormerError(f"{source}: the weights do not fit config.json; {'; '.join(problems)}")


class TokenFormerForCausalLM(_ForCausalLM):
    """A TokenFormer, grown or not, with a head for the next token."""

    config_class = TokenFormerPretrainedConfig


class TransformerForCausalLM(_ForCausalLM):
    """The plain Transformer with a head for the next token."""

    config_class = TransformerPretrainedConfig
