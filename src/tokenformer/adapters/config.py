"""What an adapter is: parameter tokens appended to one base model, known by its hash. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_json
from tokenformer.growth.spec import GrowthSpec, grown_config
from tokenformer.models.config import DecoderConfig
from tokenformer.models.tokenformer.config import ROLES, TokenFormerConfig
from tokenformer.validation import Float, Int, StrictModel, validate

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
EXPORT_DIRECTORY = "adapter"
"""Of a run directory: where the adapter that it trains lies."""

_LAYERS = {
    "attention.query": "qkv",
    "attention.key": "qkv",
    "attention.value": "qkv",
    "attention.proj": "proj",
    "ffn": "ffn",
}
_NOT_THE_FUNCTION = {"growth_history", "initializer", "max_position_embeddings"}

NumTokens = Annotated[Int, Field(ge=0)]


class AdapterSpec(StrictModel):
    """The section ``adapter`` of a run: how many parameter tokens each query, key and value layer (``qkv``), each
    attention output (``proj``) and each feed-forward layer (``ffn``) gets. ``factor`` multiplies those there are
    instead, as in growth: 1.05 adds a twentieth. ``name`` is the run directory's by default."""

    qkv: NumTokens = 0
    proj: NumTokens = 0
    ffn: NumTokens = 0
    factor: Annotated[Float, Field(gt=1, le=1e6)] | None = None
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None

    @model_validator(mode="after")
    def _check_sizes(self) -> AdapterSpec:
        if (self.factor is None) == (not any(getattr(self, role) for role in ROLES)):
            raise ValueError("expected either factor, or tokens to add in some of qkv, proj and ffn")
        return self


class AddedTokens(StrictModel):
    """Parameter tokens that an adapter adds to each layer of a role; 0 where it leaves the role alone."""

    qkv: NumTokens
    proj: NumTokens
    ffn: NumTokens

    @model_validator(mode="after")
    def _check_any(self) -> AddedTokens:
        if not any(getattr(self, role) for role in ROLES):
            raise ValueError("adds no parameter tokens to any role")
        return self


class AdapterBase(StrictModel):
    """The model that an adapter belongs to: ``weights_sha256`` as of
    :func:`~tokenformer.models.fingerprint.weights_sha256`, ``config`` without the adapter's tokens."""

    name: str
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    config: TokenFormerConfig

    @field_validator("config")
    @classmethod
    def _check_kind(cls, config: TokenFormerConfig) -> TokenFormerConfig:
        try:
            require_exact_start(config)
        except TokenFormerError as error:
            raise ValueError(str(error)) from error
        return config

    def grown(self, added: AddedTokens, config: TokenFormerConfig | None = None) -> TokenFormerConfig:
        """The configuration of ``config`` (the base's own by default) with an adapter's tokens."""
        config = config or self.config
        totals = {role: config.param_tokens(role) + getattr(added, role) for role in ROLES}
        return grown_config(config, GrowthSpec(**totals))

    def check_function(self, config: DecoderConfig, place: str) -> None:
        """Refuse a model that computes something else, whatever its weights are.

        Raises:
            TokenFormerError: names each field that differs.
        """
        expected, found = (_function(each) for each in (self.config, config))
        if config.architecture != self.config.architecture:  # whose fields are others anyway
            found = expected | {"architecture": config.architecture}
        differing = [
            f"{name}: found {found.get(name)!r}, expected {expected.get(name)!r}"
            for name in dict.fromkeys([*expected, *found])
            if found.get(name) != expected.get(name)
        ]
        if differing:
            raise TokenFormerError(
                f"{place}: an adapter of another model, '{self.name}'; {'; '.join(differing)}"
            )

    def check_hash(self, found: str, place: str, hint: str = "") -> None:
        """Refuse a model with other weights.

        Raises:
            TokenFormerError: with both hashes and the base's name.
        """
        if found != self.weights_sha256:
            raise TokenFormerError(
                f"{place}: an adapter of '{self.name}', whose weights have SHA-256 {self.weights_sha256}; "
                f"the weights here have {found}{hint}"
            )


class AdapterConfig(StrictModel):
    """``adapter_config.json``. ``training`` holds the counters of the run that made it."""

    format_version: Literal[1] = 1
    name: str
    param_tokens: AddedTokens
    base: AdapterBase
    training: dict[str, Any] = Field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Names and shapes [n, d] of the tensors, named as in the model but without the number of a group."""
        d = self.base.config.hidden_size
        return {
            f"blocks.{block}.{layer}.{kind}": (tokens, d)
            for block in range(self.base.config.num_hidden_layers)
            for layer, role in _LAYERS.items()
            if (tokens := getattr(self.param_tokens, role))
            for kind in ("key_tokens", "value_tokens")
        }

    def num_parameters(self) -> int:
        """Of the adapter alone."""
        return sum(tokens * d for tokens, d in self.shapes().values())


def require_exact_start(config: DecoderConfig) -> None:
    """Refuse a base on which no adapter can start without moving its function.

    Raises:
        TokenFormerError: no parameter tokens, or ``softmax``.
    """
    if not isinstance(config, TokenFormerConfig):
        raise TokenFormerError(
            f"architecture: found '{config.architecture}', which has no parameter tokens to add to; "
            "expected 'tokenformer'"
        )
    if config.norm_activation == "softmax":
        raise TokenFormerError(
            "norm_activation 'softmax' cannot carry an adapter: a new token adds exp(0) to the denominator even with a "
            "zero key, so that the base's function would move before the first step; expected gelu, l2_norm_gelu or "
            "gelu_l2_norm"
        )


def adapter_growth(config: DecoderConfig, spec: AdapterSpec) -> GrowthSpec:
    """The exact growth of a base of ``config`` that an adapter starts as.

    Raises:
        TokenFormerError: the base cannot carry one, or ``factor`` adds no token.
    """
    try:
        require_exact_start(config)
        assert isinstance(config, TokenFormerConfig)
        if spec.factor is not None:
            growth = GrowthSpec(factor=spec.factor)
        else:
            growth = GrowthSpec(**{role: config.param_tokens(role) + getattr(spec, role) for role in ROLES})
        grown_config(config, growth)
    except TokenFormerError as error:
        raise TokenFormerError(f"adapter: {error}") from error
    return growth


def added_tokens(base: TokenFormerConfig, config: TokenFormerConfig) -> AddedTokens:
    """What ``config`` has beyond ``base``.

    Raises:
        TokenFormerError: its first groups are not those of ``base``, or there is nothing beyond them.
    """
    for role in ROLES:
        found, expected = config.groups(role), base.groups(role)
        if found[: len(expected)] != expected:
            raise TokenFormerError(
                f"adapter: param_token_groups.{role}: found {list(found)}, expected the base's {list(expected)} first"
            )
    added = {role: config.param_tokens(role) - base.param_tokens(role) for role in ROLES}
    return validate(AddedTokens, added, source="adapter")


def is_adapter_directory(path: Path | str) -> bool:
    """Whether ``path`` holds an ``adapter_config.json``."""
    return (Path(path) / CONFIG_FILE).is_file()


def resolve_adapter_directory(path: Path | str) -> Path:
    """The adapter directory at ``path``: itself, or ``adapter/`` inside a run directory.

    Raises:
        TokenFormerError: neither is there.
    """
    path = Path(path)
    for candidate in (path, path / EXPORT_DIRECTORY):
        if is_adapter_directory(candidate):
            return candidate
    if not path.exists():
        found = "no such directory"
    elif (path / "config.json").is_file():
        found = "a model directory"
    else:
        found = "a file" if path.is_file() else f"no {CONFIG_FILE} in it"
    raise TokenFormerError(
        f"{path}: {found}; expected an adapter directory (with {CONFIG_FILE}) or the run directory of an adapter"
    )


def read_adapter_config(directory: Path | str) -> AdapterConfig:
    """Read ``adapter_config.json``.

    Raises:
        TokenFormerError: missing, invalid, of another version, or of a base that can carry no adapter.
    """
    path = Path(directory) / CONFIG_FILE
    return validate(AdapterConfig, read_json(path, "the configuration of an adapter"), source=str(path))


def _function(config: DecoderConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_NOT_THE_FUNCTION)
