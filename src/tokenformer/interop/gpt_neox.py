"""GPT-NeoX and Pythia directories of transformers (``GPTNeoXForCausalLM``) to model directories and back.

Axis letters: d hidden, h heads, e head size, m MLP features, v vocabulary. Transformers keeps query, key and value in
one matrix [3 d, d], interleaved by head: rows of head i are its e query, e key and e value features.

GPT-NeoX always has biases in the MLP and a weight and bias in every norm. Where a Transformer of ours has none, ones
and zeros are written, which computes the same; MLP biases of zeros beside ``attention_bias: false`` are read as none.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.files import new_directory, require_free, write_json, write_text
from tokenformer.interop.formats import Converted
from tokenformer.interop.gpt_neox_config import GPTNeoXConfig, read_gpt_neox_config
from tokenformer.interop.source import license_beside, tokenizer_beside, write_native
from tokenformer.interop.weights import Buffer, NativeTensor, check_weights, read_weights, rotary_frequencies
from tokenformer.models.card import model_card
from tokenformer.models.directory import load_model, save_weights
from tokenformer.models.paths import resolve_model_directory
from tokenformer.models.registry import load_config
from tokenformer.models.transformer.config import TransformerConfig

_EMBEDDING, _HEAD = "gpt_neox.embed_in.weight", "embed_out.weight"
_QKV = "attention.query_key_value"
_LAYERS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention.dense": "attention.proj",
    "mlp.dense_h_to_4h": "ffn.up",
    "mlp.dense_4h_to_h": "ffn.down",
}


def tensor_map(config: GPTNeoXConfig) -> dict[str, NativeTensor]:
    """Every key of a GPT-NeoX state dict with its shape and our name; of the fused matrix, the layer's name."""
    d, m = config.hidden_size, config.intermediate_size
    shapes = {
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
        "attention.dense": (d, d),
        "mlp.dense_h_to_4h": (m, d),
        "mlp.dense_4h_to_h": (d, m),
    }
    tensors = {_EMBEDDING: NativeTensor("embedding.weight", (config.vocab_size, d))}
    for block in range(config.num_hidden_layers):
        theirs, ours = f"gpt_neox.layers.{block}", f"blocks.{block}"
        tensors[f"{theirs}.{_QKV}.weight"] = NativeTensor(f"{ours}.attention.weight", (3 * d, d))
        if config.attention_bias:
            tensors[f"{theirs}.{_QKV}.bias"] = NativeTensor(f"{ours}.attention.bias", (3 * d,))
        for name, shape in shapes.items():
            tensors[f"{theirs}.{name}.weight"] = NativeTensor(f"{ours}.{_LAYERS[name]}.weight", shape)
            if name != "attention.dense" or config.attention_bias:
                tensors[f"{theirs}.{name}.bias"] = NativeTensor(f"{ours}.{_LAYERS[name]}.bias", shape[:1])
    for kind in ("weight", "bias"):
        tensors[f"gpt_neox.final_layer_norm.{kind}"] = NativeTensor(f"norm.{kind}", (d,))
    if not config.tie_word_embeddings:
        tensors[_HEAD] = NativeTensor("head.weight", (config.vocab_size, d))
    return tensors


def gpt_neox_to_native(source: Path, target: Path) -> Converted:
    """Write the model directory ``target`` from the GPT-NeoX directory ``source``; tensors keep their dtype.

    Raises:
        TokenFormerError: missing, damaged or unexpected content of ``source``, each problem named; ``target``
            holds something.
    """
    require_free(target)
    path = source / "config.json"
    theirs = read_gpt_neox_config(path)
    native = theirs.to_native(str(path), use_bias=theirs.attention_bias)
    tokenizer = tokenizer_beside(source, theirs.vocab_size, "vocab_size")
    weights = read_weights(source)
    expected = tensor_map(theirs)
    check_weights(weights.tensors, expected, weights.files[0], buffers=_buffers(theirs, weights.tensors))

    state = _native_state(weights.tensors, expected, theirs.num_attention_heads)
    changes: list[str] = []
    if not theirs.attention_bias:
        state, change = _without_attention_bias(state, theirs)
        changes.append(change)
    native = native.model_copy(update={"use_bias": "blocks.0.ffn.up.bias" in state})
    write_native(
        native,
        state,
        target,
        origin="a GPT-NeoX model in transformers' format",
        source=source,
        config_name=path.name,
        weights=weights,
        tokenizer=tokenizer,
    )
    return Converted(target, native, len(expected), weights.dtypes, tokenizer is not None, tuple(changes))


def native_to_gpt_neox(source: Path, target: Path) -> Converted:
    """Write the GPT-NeoX directory ``target`` from the model (or run) directory ``source``; tensors keep their dtype.

    Raises:
        TokenFormerError: the model cannot be represented, with the reason; NaN or infinite weights; damaged content
            of ``source``; ``target`` holds something.
    """
    require_free(target)
    directory = resolve_model_directory(source)
    place = str(directory / "config.json")
    config = load_config(directory)
    if not isinstance(config, TransformerConfig):
        raise TokenFormerError(
            f"{place}: model_type is '{config.architecture}'; GPT-NeoX directories hold Transformers only"
        )
    theirs = GPTNeoXConfig.from_native(config, place)
    tokenizer = tokenizer_beside(directory, config.vocab_size, "vocab_size")
    state, changes = _completed(load_model(directory).state_dict(), config)
    weights = _gpt_neox_weights(state, theirs)
    check_weights(weights, tensor_map(theirs), directory)

    facts = {"Origin": {"converted from": "a model directory", "source": source.resolve().name}}
    card = model_card(config, facts, library="transformers", license=license_beside(directory))
    with new_directory(target) as scratch:
        ids = {} if tokenizer is None else {"bos_token_id": tokenizer.eos_token_id}
        ids |= {} if tokenizer is None else {"eos_token_id": tokenizer.eos_token_id}
        write_json(scratch / "config.json", theirs.to_json() | ids)
        save_weights(weights, scratch)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, scratch / name)
        write_text(scratch / "README.md", card)
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}))
    return Converted(target, config, len(weights), dtypes, tokenizer is not None, tuple(changes))


def _native_state(
    weights: dict[str, Tensor], expected: dict[str, NativeTensor], heads: int
) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, ours in expected.items():
        tensor = weights[key]
        if _QKV not in key:
            state[ours.name] = tensor
            continue
        layer, kind = ours.name.rsplit(".", 1)
        by_head = tensor.unflatten(0, (heads, 3, -1))  # [3 d, ...] -> [h, 3, e, ...]
        for index, name in enumerate(("query", "key", "value")):
            state[f"{layer}.{name}.{kind}"] = by_head[:, index].flatten(0, 1).contiguous()
    return state


def _without_attention_bias(state: dict[str, Tensor], config: GPTNeoXConfig) -> tuple[dict[str, Tensor], str]:
    """``state`` with biases in all projections or in none, as ours has them, and what was done, in words."""
    ours = {name for name in state if ".ffn." in name and name.endswith(".bias")}
    if not any(bool(state[name].any()) for name in ours):
        without = {name: tensor for name, tensor in state.items() if name not in ours}
        return without, "attention_bias is false and the biases of the MLP are zeros: use_bias is false"
    zeros = {
        f"blocks.{block}.attention.{name}.bias": state["norm.bias"].new_zeros(config.hidden_size)
        for block in range(config.num_hidden_layers)
        for name in ("query", "key", "value", "proj")
    }
    return state | zeros, "attention_bias is false: the attention's biases, which use_bias gives, are zeros"


def _gpt_neox_weights(state: dict[str, Tensor], config: GPTNeoXConfig) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    heads = config.num_attention_heads
    for key, ours in tensor_map(config).items():
        if _QKV not in key:
            weights[key] = state[ours.name]
            continue
        layer, kind = ours.name.rsplit(".", 1)
        parts = [
            state[f"{layer}.{name}.{kind}"].unflatten(0, (heads, -1)) for name in ("query", "key", "value")
        ]
        weights[key] = torch.stack(parts, dim=1).flatten(0, 2)  # [h, 3, e, ...] -> [3 d, ...]
    return weights


def _completed(state: dict[str, Tensor], config: TransformerConfig) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` with the ones and zeros that GPT-NeoX needs and we do without, and what was done, in words."""
    state, changes = dict(state), []
    for block in range(config.num_hidden_layers):
        up = state[f"blocks.{block}.ffn.up.weight"]
        if not config.use_bias:
            state[f"blocks.{block}.ffn.up.bias"] = up.new_zeros(up.shape[0])
            state[f"blocks.{block}.ffn.down.bias"] = up.new_zeros(up.shape[1])
        if not config.layer_norm_affine:
            for norm in ("attention_norm", "ffn_norm"):
                state[f"blocks.{block}.{norm}.weight"] = up.new_ones(up.shape[1])
                state[f"blocks.{block}.{norm}.bias"] = up.new_zeros(up.shape[1])
    if not config.use_bias:
        changes.append("use_bias is false: biases of zeros were added to the MLP, which GPT-NeoX always has")
    if not config.layer_norm_affine:
        changes.append("layer_norm_affine is false: ones and zeros were added to the norms")
    if config.logit_scale != 1.0:
        changes.append(f"logit_scale {config.logit_scale:g} moved into the final norm")
        for kind in ("weight", "bias"):
            state[f"norm.{kind}"] = state[f"norm.{kind}"] * config.logit_scale
    return state, changes


def _buffers(config: GPTNeoXConfig, weights: dict[str, Tensor]) -> dict[str, Buffer]:
    """What older versions of transformers stored besides weights."""
    rotary_dim = int(config.hidden_size // config.num_attention_heads * config.rotary_pct)

    def is_causal_mask(found: Tensor) -> bool:
        return found.ndim == 4 and torch.equal(found.bool(), torch.ones_like(found).bool().tril())

    def is_embedding(found: Tensor) -> bool:
        return _EMBEDDING in weights and torch.equal(found, weights[_EMBEDDING])

    buffers: dict[str, Buffer] = {_HEAD: is_embedding} if config.tie_word_embeddings else {}
    frequencies = rotary_frequencies(rotary_dim, config.rotary_emb_base)
    for block in range(config.num_hidden_layers):
        attention = f"gpt_neox.layers.{block}.attention"
        buffers[f"{attention}.bias"] = is_causal_mask
        buffers[f"{attention}.masked_bias"] = lambda found: found.numel() == 1
        buffers[f"{attention}.rotary_emb.inv_freq"] = frequencies
    return buffers
