"""Configurations of the authors' code: a ``config.json`` of our fields' counterparts, or its GPT-NeoX YAML.

The YAML files (``150M_eval.yml`` and so on) are JSON with comments, hold all of a run's settings, and spell names with
hyphens or underscores. What decides the function is taken or compared; the rest (optimiser, data, paths) is not ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_json, read_text
from tokenformer.models.config import PositiveFloat, PositiveInt
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.validation import StrictModel, validate

ROPE_THETA = 10000.0
_MEANING = "the configuration of an authors' checkpoint"


class OfficialConfig(StrictModel):
    """What decides the function of the authors' model; ``*_slot_num`` are the numbers of parameter tokens."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    qkv_slot_num: PositiveInt
    proj_slot_num: PositiveInt
    ffn_slot_num: PositiveInt
    seq_length: PositiveInt
    rotary_pct: Annotated[float, Field(ge=0, le=1)]
    norm_activation_type: Literal["softmax", "gelu_l2_norm", "l2_norm_gelu"]
    padded_vocab_size: PositiveInt
    layernorm_epsilon: PositiveFloat
    tied: Literal[True]
    """The key names of an untied output layer are not known."""

    def to_native(self, source: str) -> TokenFormerConfig:
        """The same model in our words: tau = n, exact GELU, no eps in the L2 norms."""
        fields = {
            "vocab_size": self.padded_vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "qkv_param_tokens": self.qkv_slot_num,
            "proj_param_tokens": self.proj_slot_num,
            "ffn_param_tokens": self.ffn_slot_num,
            "norm_activation": self.norm_activation_type,
            "gelu_approximate": "none",
            "position_embedding": "rotary",
            "rotary_pct": self.rotary_pct,
            "rope_theta": ROPE_THETA,
            "max_position_embeddings": self.seq_length,
            "layer_norm_eps": self.layernorm_epsilon,
            "tie_word_embeddings": True,
            "initializer": "published",
        }
        return validate(TokenFormerConfig, fields, source=source)


_FLOATS = ("rotary_pct", "layernorm_epsilon", "rotary_emb_base")
_NEOX_DEFAULTS = {"rotary_pct": 1.0, "layernorm_epsilon": 1e-5}  # of GPT-NeoX, where a file leaves them out
_TAKEN = [name for name in OfficialConfig.model_fields if name not in ("padded_vocab_size", "tied")]

# Field of the YAML -> the values under which the authors' code computes what ours does.
_NEEDED: dict[str, tuple[object, ...]] = {"pos_emb": ("rotary",), "norm": ("layernorm_nonparam",)}
_IF_THERE: dict[str, tuple[object, ...]] = {
    "final_norm": ("layernorm",),
    "no_weight_tying": (False,),
    "gpt_j_residual": (False,),
    "rotary_emb_base": (ROPE_THETA,),
    "use_mup": (False,),
    "sliding_window_width": (None,),
}


def find_config(directory: Path) -> Path:
    """The configuration beside a checkpoint: ``config.json``, or the one YAML file there or in ``configs/``.

    Raises:
        TokenFormerError: none, or several.
    """
    if (directory / "config.json").is_file():
        return directory / "config.json"
    found = sorted(
        path for place in (directory, directory / "configs") for path in place.glob("*") if is_yaml(path)
    )
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(path.relative_to(directory)) for path in found)
        raise TokenFormerError(f"{directory}: {len(found)} configurations ({names}); name one with --config")
    raise TokenFormerError(
        f"{directory / 'config.json'}: no such file; expected {_MEANING}, a YAML file such as 150M_eval.yml beside it, "
        "or one named with --config"
    )


def is_yaml(path: Path) -> bool:
    """Whether the name is that of a YAML file."""
    return path.suffix in (".yml", ".yaml")


def read_official_config(path: Path, padded_vocab_size: int | None) -> OfficialConfig:
    """The configuration in ``path``, JSON or YAML.

    Args:
        path: the file.
        padded_vocab_size: rows of the embedding in the checkpoint, which a YAML does not say.

    Raises:
        TokenFormerError: missing or broken file; wrong, missing or unknown fields; a model that is computed otherwise.
    """
    if not is_yaml(path):
        return validate(OfficialConfig, read_json(path, _MEANING), source=str(path))
    values = _read_yaml(path)
    problems = _differences(values)
    if problems:
        raise TokenFormerError("\n".join(f"{path}: {problem}" for problem in problems))
    fields = _NEOX_DEFAULTS | {name: values[name] for name in _TAKEN if name in values}
    vocab_size = values.get("padded_vocab_size", padded_vocab_size)
    if vocab_size is not None:
        fields["padded_vocab_size"] = vocab_size
    return validate(OfficialConfig, {**fields, "tied": True}, source=str(path))


def _read_yaml(path: Path) -> dict[str, Any]:
    text = read_text(path, _MEANING)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise TokenFormerError(f"{path}: invalid YAML{where}; expected {_MEANING}") from error
    if not isinstance(values, dict):
        raise TokenFormerError(f"{path}: found a {type(values).__name__}, expected a mapping: {_MEANING}")
    named: dict[str, Any] = {}
    for written, value in values.items():
        name = str(written).replace("-", "_")
        if name in named and named[name] != value:
            raise TokenFormerError(f"{path}: {name}: given twice, as {named[name]!r} and {value!r}")
        named[name] = _number(value) if name in _FLOATS else value
    return named


def _number(value: object) -> object:
    """YAML 1.1 takes ``1e-5``, without a point, for text; JSON and the authors' code mean a number."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _differences(values: dict[str, Any]) -> list[str]:
    """Fields under which the authors' code computes something else than a TokenFormer of ours."""
    problems = [
        f"{name}: missing; expected {allowed[0]!r}" for name, allowed in _NEEDED.items() if name not in values
    ]
    problems += [
        f"{name}: found {values[name]!r}; expected {allowed[0]!r}, the only kind that can be converted"
        for name, allowed in (_NEEDED | _IF_THERE).items()
        if name in values and values[name] not in allowed
    ]
    kinds = sorted(set(_strings(values.get("attention_config"))) - {"tokenformer", "all"})
    if kinds:
        problems.append(f"attention_config: found {', '.join(kinds)}; expected tokenformer in every layer")
    return problems


def _strings(value: object) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _strings(item)]
    return [value] if isinstance(value, str) else []
