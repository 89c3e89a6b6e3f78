"""Growth of the plain Transformer, for comparison: wider without a change of the function, or deeper.

Widening repeats every feature r times and divides what reads it by r, as Net2Net and LEMON do (arXiv 1511.05641,
2310.07999); deepening repeats the blocks, as gradual stacking and G_stack do (arXiv 2405.15319).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from tokenformer.errors import TokenFormerError
from tokenformer.models.empty import empty_model
from tokenformer.models.transformer.config import TransformerConfig
from tokenformer.models.transformer.model import Transformer

Order = Literal["stack", "interleave"]


class GrownTransformer(NamedTuple):
    """A larger Transformer. ``sources``: for each of its parameters the old one that it was made of; ``factor``: how
    often features were repeated (1: the model became deeper)."""

    model: Transformer
    sources: dict[str, str]
    factor: int = 1

    def moments(self, named: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Adam's moments of the larger model from those of the old one, by parameter name.

        With features repeated r times every gradient is 1/r of the old one: ``exp_avg`` follows, and ``exp_avg_sq`` by
        1/r^2. Blocks that were repeated take the moments of the block they repeat.
        """
        powers = {"exp_avg": 1, "exp_avg_sq": 2}
        moved = {}
        for name, source in self.sources.items():
            shape = self.model.get_parameter(name).shape
            moved[name] = {
                key: _tile(value, shape) / self.factor ** powers[key] if key in powers else value.clone()
                for key, value in named.get(source, {}).items()
            }
        return {name: state for name, state in moved.items() if state}


def widen_transformer(
    model: Transformer, factor: int, *, noise: float = 0.5, seed: int = 0
) -> GrownTransformer:
    """A copy with ``factor`` times the hidden features, heads and MLP features that computes the same function.

    Args:
        model: tied to its embedding; stays as it is.
        factor: r, at least 2; parameters grow by r^2 in the blocks.
        noise: standard deviation of what parts the copies, relative to each matrix's root mean square. It sums to zero
            over the copies of an input; without it equal features would have equal gradients for ever.
        seed: draws the noise.

    Returns:
        The larger model, whose ``logit_scale`` is divided by r.

    Raises:
        TokenFormerError: an untied head, or a factor below 2.
    """
    _check_factor(factor)
    old = model.config
    if not old.tie_word_embeddings:
        raise TokenFormerError("widen_transformer: tie_word_embeddings is false, expected a tied head")
    config = _changed(
        old,
        hidden_size=factor * old.hidden_size,
        num_attention_heads=factor * old.num_attention_heads,
        intermediate_size=old.intermediate_size and factor * old.intermediate_size,
        logit_scale=old.logit_scale / factor,
    )
    generator = torch.Generator().manual_seed(seed)
    wide = {}
    for name, weight in model.state_dict().items():
        if name == "embedding.weight":
            wide[name] = weight.repeat(1, factor)
        elif weight.ndim == 1:
            wide[name] = weight.repeat(factor)
        else:
            wide[name] = _widen(weight, factor, noise, generator)
    return GrownTransformer(_build(config, wide), {name: name for name in wide}, factor)


def deepen_transformer(
    model: Transformer, factor: int, *, order: Order = "stack", identity: bool = False
) -> GrownTransformer:
    """A copy with every block ``factor`` times.

    Args:
        model: stays as it is.
        factor: r, at least 2; the blocks hold r times the parameters.
        order: ``stack`` puts whole copies of the stack on each other (1 2 1 2), ``interleave`` each block behind itself
            (1 1 2 2).
        identity: the further copies begin with outputs of zero, so that the function stays; else it changes.

    Raises:
        TokenFormerError: a factor below 2.
    """
    _check_factor(factor)
    layers = model.config.num_hidden_layers
    config = _changed(model.config, num_hidden_layers=factor * layers)
    old = model.state_dict()
    deep, sources = {}, {}
    for name, _ in empty_model(config).named_parameters():
        sources[name], is_first = _source_block(name, layers, factor, order)
        silent = identity and not is_first and any(part in name for part in ("attention.proj.", "ffn.down."))
        deep[name] = torch.zeros_like(old[sources[name]]) if silent else old[sources[name]].clone()
    return GrownTransformer(_build(config, deep), sources)


def _check_factor(factor: int) -> None:
    if factor < 2:
        raise TokenFormerError(f"factor: found {factor}, expected at least 2")


def _source_block(name: str, layers: int, factor: int, order: Order) -> tuple[str, bool]:
    """The old parameter that one of the deeper model repeats, and whether it is its first copy."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return name, True
    index = int(parts[1])
    source, turn = (index % layers, index // layers) if order == "stack" else divmod(index, factor)
    return ".".join(["blocks", str(source), *parts[2:]]), turn == 0


def _widen(weight: Tensor, factor: int, noise: float, generator: torch.Generator) -> Tensor:
    """[out, in] -> [r out, r in]: each copy of an output reads all copies of each input, whose weights sum to the
    old one."""
    rows, columns = weight.shape
    drawn = torch.randn(factor, rows, factor, columns, generator=generator, dtype=weight.dtype)
    drawn *= noise * weight.square().mean().sqrt() * (factor / (factor - 1)) ** 0.5
    drawn -= drawn.mean(2, keepdim=True)
    return (weight[None, :, None] / factor + drawn).reshape(factor * rows, factor * columns)


def _tile(value: Tensor, shape: torch.Size) -> Tensor:
    """``value`` repeated along each axis up to ``shape``."""
    return value.repeat([new // old for new, old in zip(shape, value.shape, strict=True)])


def _changed(config: TransformerConfig, **fields: float | None) -> TransformerConfig:
    return TransformerConfig.model_validate(config.model_dump() | fields)


def _build(config: TransformerConfig, weights: dict[str, Tensor]) -> Transformer:
    model = cast(Transformer, empty_model(config))
    model.load_state_dict(weights, strict=True, assign=True)
    return model
