"""A model directory in numbers: from its configuration and the header of its weights alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from tokenformer.errors import TokenFormerError
from tokenformer.models.config import DecoderConfig
from tokenformer.models.paths import weight_files
from tokenformer.models.registry import load_config
from tokenformer.models.tokenformer.config import ROLES, TokenFormerConfig
from tokenformer.progress import short_number
from tokenformer.report.tables import Table, byte_size, count
from tokenformer.train.ladder import check_recomputation
from tokenformer.train.memory import TrainingMemory, TrainingSetup, training_memory

_OVERVIEW = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "norm_activation",
    "hidden_act",
    "position_embedding",
    "tie_word_embeddings",
)


class TensorHeader(NamedTuple):
    """dtype (safetensors' name, e.g. ``F32``) and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]


def describe_model(
    path: Path, setup: Callable[[int], TrainingSetup] | None = None
) -> tuple[dict[str, Any], list[Table]]:
    """Facts and tables of a model directory; ``setup``, of the model's context, says how it would be trained (by
    default one sequence of the full context at a time, in bfloat16 on a GPU).

    Raises:
        TokenFormerError: missing or damaged configuration or weights.
    """
    config = load_config(path)
    facts: dict[str, Any] = {"kind": "model", "path": str(path)}
    facts |= describe_config(config)
    make_setup = setup or partial(TrainingSetup, 1)
    found = describe_memory("", config, make_setup(config.max_position_embeddings))
    facts["training_memory"] = [found]
    facts["weights"] = _describe_weights(path, config)
    facts["has_tokenizer"] = (path / "tokenizer.json").is_file()
    tables = [_overview_table(facts), *config_tables(facts), memory_table(facts["training_memory"])]
    return facts, [*tables, _weights_table(facts["weights"])]


def describe_memory(name: str, config: DecoderConfig, setup: TrainingSetup) -> dict[str, Any]:
    """Bytes of training on one device, and what they were predicted for.

    Raises:
        TokenFormerError: the model has no scores to recompute.
    """
    checkpointing = setup.activation_checkpointing
    check_recomputation(checkpointing, config)
    recomputed = checkpointing.recomputed_blocks(config.num_hidden_layers)
    values = asdict(setup) | {
        "activation_checkpointing": checkpointing.mode,
        "recompute": checkpointing.recompute if recomputed else "nothing",
        "recomputed_blocks": len(recomputed),
    }
    return {"name": name, "setup": values, "bytes": training_memory(config, setup)._asdict()}


def memory_table(predictions: list[dict[str, Any]]) -> Table:
    """Predicted memory of training on one device, a column for each setup."""
    settings = {
        "sequences at once": "micro_batch_size",
        "sequence length": "sequence_length",
        "dtype": "dtype",
        "compiled": "compiled",
        "optimizer": "optimizer",
        "activation checkpointing": "activation_checkpointing",
        "computed again": "recompute",
        "in so many blocks": "recomputed_blocks",
        "devices that shard": "shard",
        "devices that split tokens": "tensor",
    }
    rows = [(words, *(str(found["setup"][key]) for found in predictions)) for words, key in settings.items()]
    rows += [
        (part, *(byte_size(found["bytes"][part]) for found in predictions)) for part in TrainingMemory._fields
    ]
    return Table(
        "Memory of training on one device (predicted)", ("", *(f["name"] for f in predictions)), rows
    )


def describe_config(config: DecoderConfig) -> dict[str, Any]:
    """Facts that follow from a configuration: parameters, groups, growth, memory (bytes) and FLOPs."""
    total, context = config.num_parameters(), config.max_position_embeddings
    facts: dict[str, Any] = {
        "architecture": config.architecture,
        "config": config.to_json(),
        "parameters": {"total": total, "by_part": config.parameter_counts()},
        "memory_bytes": {
            "weights_float32": 4 * total,
            "weights_bfloat16": 2 * total,
        },
        "flops_per_token": {
            "context": context,
            "training": config.flops_per_token(context),
            "forward": config.flops_per_token(context) / 3,
        },
    }
    if isinstance(config, TokenFormerConfig):
        facts["groups"] = config.param_token_groups.model_dump(mode="json")
        facts["tau"] = config.tau.model_dump(mode="json")
        facts["growth"] = _growth_stages(config)
    return facts


def config_tables(facts: dict[str, Any]) -> list[Table]:
    """Tables of :func:`describe_config`."""
    total = facts["parameters"]["total"]
    parts = [
        (part, count(n), f"{100 * n / total:.1f} %") for part, n in facts["parameters"]["by_part"].items()
    ]
    tables = [Table("Parameters", ("part", "parameters", "share"), [*parts, ("total", count(total), "")])]
    if "groups" in facts:
        rows = [
            (role, count(sum(sizes)), " + ".join(map(str, sizes)), f"{facts['tau'][role]:g}")
            for role, sizes in facts["groups"].items()
        ]
        tables.append(Table("Parameter tokens", ("role", "tokens", "groups", "tau"), rows))
    if facts.get("growth"):
        columns = ("growth", "at step", *(f"{role} tokens" for role in ROLES), "parameters")
        tables.append(Table("Growth history", columns, [_growth_row(stage) for stage in facts["growth"]]))
    memory, flops = facts["memory_bytes"], facts["flops_per_token"]
    cost = [
        ("weights, float32", byte_size(memory["weights_float32"])),
        ("weights, bfloat16", byte_size(memory["weights_bfloat16"])),
        (f"training FLOPs a token (context {flops['context']})", short_number(flops["training"])),
        (f"forward FLOPs a token (context {flops['context']})", short_number(flops["forward"])),
    ]
    return [*tables, Table("Cost", ("what", "amount"), cost)]


def _growth_row(stage: dict[str, Any]) -> tuple[str, ...]:
    step = "" if stage["step"] is None else count(stage["step"])
    tokens = (count(stage[f"{role}_param_tokens"]) for role in ROLES)
    return (stage["init"] or "start", step, *tokens, count(stage["parameters"]))


def read_weight_headers(directory: Path) -> dict[str, TensorHeader]:
    """Name, dtype and shape of every stored tensor, without reading the weights.

    Raises:
        TokenFormerError: missing or damaged ``model.safetensors`` or index.
    """
    return read_headers(weight_files(directory))


def read_headers(files: Sequence[Path]) -> dict[str, TensorHeader]:
    """The same of safetensors files.

    Raises:
        TokenFormerError: a missing or damaged file.
    """
    headers: dict[str, TensorHeader] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                for key in tensors.keys():  # noqa: SIM118  # not a dict
                    entry = tensors.get_slice(key)
                    headers[key] = TensorHeader(entry.get_dtype(), tuple(entry.get_shape()))
        except (SafetensorError, OSError) as error:
            raise TokenFormerError(f"{file}: damaged, not readable as safetensors ({error})") from error
    return headers


def _describe_weights(path: Path, config: DecoderConfig) -> dict[str, Any]:
    files, headers = weight_files(path), read_weight_headers(path)
    stored: dict[str, int] = {}
    for name, header in headers.items():
        part = _part_of(name)
        stored[part] = stored.get(part, 0) + math.prod(header.shape)
    return {
        "files": [file.name for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "tensors": len(headers),
        "dtypes": sorted({header.dtype for header in headers.values()}),
        "parameters": sum(stored.values()),
        "differences": _differences(stored, config.parameter_counts()),
    }


def _differences(stored: dict[str, int], expected: dict[str, int]) -> list[str]:
    return [
        f"{part}: the weights hold {count(stored.get(part, 0))} parameters, config.json says {count(n)}"
        for part, n in {**dict.fromkeys(stored, 0), **expected}.items()
        if stored.get(part, 0) != n
    ]


def _part_of(name: str) -> str:
    """The part of ``parameter_counts`` that a tensor belongs to."""
    pieces = name.split(".")
    for part in ("attention", "ffn"):
        if pieces[0] == "blocks" and part in pieces:
            return part
    return "norm" if any("norm" in piece for piece in pieces) else pieces[0]


def _growth_stages(config: TokenFormerConfig) -> list[dict[str, Any]]:
    """Sizes from the first stage to the last; the first one is known where no groups were merged or removed."""
    stages = [step.model_dump(mode="json") for step in config.growth_history]
    if stages and all(len(config.groups(role)) == len(stages) + 1 for role in ROLES):
        sizes = {f"{role}_param_tokens": config.groups(role)[0] for role in ROLES}
        stages.insert(0, {"init": None, "step": 0, **sizes})
    for stage in stages:
        totals = {f"{role}_param_tokens": stage[f"{role}_param_tokens"] for role in ROLES}
        fresh = {"param_token_groups": None, "tau": None, "growth_history": ()}
        sized = TokenFormerConfig.model_validate({**config.model_dump(), **fresh, **totals})
        stage["parameters"] = sized.num_parameters()
    return stages


def _overview_table(facts: dict[str, Any]) -> Table:
    config = facts["config"]
    rows = [(name, str(config[name])) for name in _OVERVIEW if name in config]
    rows.append(("tokenizer", "tokenizer.json" if facts["has_tokenizer"] else "none"))
    return Table(f"{facts['architecture']} model: {facts['path']}", ("field", "value"), rows)


def _weights_table(weights: dict[str, Any]) -> Table:
    rows = [
        ("files", ", ".join(weights["files"])),
        ("size", byte_size(weights["bytes"])),
        ("tensors", count(weights["tensors"])),
        ("dtype", ", ".join(weights["dtypes"])),
        ("parameters", count(weights["parameters"])),
        ("agree with config.json", "no" if weights["differences"] else "yes"),
    ]
    rows += [("difference", difference) for difference in weights["differences"]]
    return Table("Stored weights", ("what", "value"), rows)
