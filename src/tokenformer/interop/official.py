"""The authors' checkpoints (github.com/Haiyang-W/TokenFormer, GPT-NeoX key names) to model directories.

A source directory holds weights (:func:`~tokenformer.interop.weights.read_weights`) and a configuration
(:mod:`~tokenformer.interop.official_config`), or the configuration is named. Every key is accounted for: nothing is
guessed, skipped or filled in. Axis letters: d hidden, n parameter tokens, v vocabulary, L layers.
"""

from __future__ import annotations

from pathlib import Path

from tokenformer.errors import TokenFormerError
from tokenformer.files import require_free
from tokenformer.interop.formats import Converted
from tokenformer.interop.official_config import ROPE_THETA, OfficialConfig, find_config, read_official_config
from tokenformer.interop.source import tokenizer_beside, write_native
from tokenformer.interop.weights import Buffer, NativeTensor, check_weights, read_weights, rotary_frequencies

_EMBEDDING = "sequential.0.word_embeddings.weight"


def tensor_map(config: OfficialConfig) -> dict[str, NativeTensor]:
    """Every key of a checkpoint with its place in ours. Block i is ``sequential.{i+2}``, the norm ``{L+3}``."""
    d = config.hidden_size
    tensors = {_EMBEDDING: NativeTensor("embedding.weight", (config.padded_vocab_size, d))}
    pattentions = {
        "attention.query": ("attention.query", config.qkv_slot_num),
        "attention.key": ("attention.key", config.qkv_slot_num),
        "attention.value": ("attention.value", config.qkv_slot_num),
        "attention.proj": ("attention.proj", config.proj_slot_num),
        "mlp": ("ffn", config.ffn_slot_num),
    }
    for block in range(config.num_layers):
        for theirs, (ours, n) in pattentions.items():
            for kind in ("key", "value"):
                key = f"sequential.{block + 2}.{theirs}.{kind}_param_tokens"
                tensors[key] = NativeTensor(f"blocks.{block}.{ours}.{kind}_tokens.0", (n, d))
    for kind in ("weight", "bias"):
        tensors[f"sequential.{config.num_layers + 3}.norm.{kind}"] = NativeTensor(f"norm.{kind}", (d,))
    return tensors


def official_to_native(source: Path, target: Path, *, config: Path | None = None) -> Converted:
    """Write the model directory ``target`` from the authors' checkpoint in ``source``.

    ``tokenizer.json`` is copied where ``source`` has one. Weights become float32.

    Args:
        source: a directory with weights, and a configuration unless ``config`` names one.
        target: new or empty.
        config: ``config.json``, or a YAML file of the authors' code.

    Raises:
        TokenFormerError: missing, damaged or unexpected content of ``source``, each problem named; ``target``
            holds something.
    """
    require_free(target)
    config = find_config(source) if config is None else config
    if not config.is_file():
        raise TokenFormerError(
            f"{config}: no such file; expected the configuration of an authors' checkpoint"
        )
    weights = read_weights(source)
    embedding = weights.tensors.get(_EMBEDDING)
    rows = embedding.shape[0] if embedding is not None and embedding.ndim == 2 else None
    official = read_official_config(config, rows)
    native = official.to_native(str(config))
    tokenizer = tokenizer_beside(source, native.vocab_size, "padded_vocab_size")
    expected = tensor_map(official)
    check_weights(weights.tensors, expected, weights.files[0], buffers=_buffers(official, native.rotary_dim))

    write_native(
        native,
        {ours.name: weights.tensors[key].float() for key, ours in expected.items()},
        target,
        origin="a checkpoint of the authors' code",
        source=source,
        config_name=config.name,
        weights=weights,
        tokenizer=tokenizer,
    )
    return Converted(target, native, len(expected), weights.dtypes, tokenizer is not None)


def _buffers(official: OfficialConfig, rotary_dim: int) -> dict[str, Buffer]:
    """What GPT-NeoX stores with ``rotary_save_freqs_buffer``, and older versions always."""
    fits = rotary_frequencies(rotary_dim, ROPE_THETA)
    return {
        f"sequential.{block + 2}.attention.rotary_emb.inv_freq": fits for block in range(official.num_layers)
    }
