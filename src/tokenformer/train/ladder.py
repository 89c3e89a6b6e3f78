"""The models along a ladder, computed from sizes alone, so that every stage is checked before the first begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenformer.errors import TokenFormerError
from tokenformer.growth.spec import grown_config
from tokenformer.models.config import DecoderConfig
from tokenformer.models.tokenformer.config import ROLES, TokenFormerConfig
from tokenformer.train.sections import ActivationCheckpointingConfig

if TYPE_CHECKING:
    from tokenformer.train.config import StageConfig


def model_configs(
    initial: DecoderConfig, stages: Sequence[StageConfig], *, first: int = 0
) -> list[DecoderConfig]:
    """Configuration of the model in each stage from ``first`` on; ``initial`` is the one before stage 0's growth,
    or, for a later ``first``, the one in that stage.

    Raises:
        TokenFormerError: a growth that cannot be, or a sequence longer than the model's context, with its stage; scores
            to recompute that are not there.
    """
    configs = []
    current = initial
    for index, stage in enumerate(stages[first:], first):
        if stage.grow is not None and (index > first or first == 0):
            try:
                current = grown_config(current, stage.grow)
            except TokenFormerError as error:
                raise TokenFormerError(f"stages.{index}.grow: {error}") from error
        if stage.data.sequence_length > current.max_position_embeddings:
            raise TokenFormerError(
                f"data.sequence_length: found {stage.data.sequence_length} in {stage.name}, but the model's "
                f"max_position_embeddings is {current.max_position_embeddings}"
            )
        check_recomputation(stage.activation_checkpointing, current)
        configs.append(current)
    return configs


def check_recomputation(checkpointing: ActivationCheckpointingConfig, model: DecoderConfig) -> None:
    """Refuse to recompute what the model does not have.

    Raises:
        TokenFormerError: scores of parameter tokens, of a model without.
    """
    without = not isinstance(model, TokenFormerConfig)
    if without and checkpointing.mode != "none" and checkpointing.recompute == "scores":
        raise TokenFormerError(
            f"activation_checkpointing.recompute: found 'scores' for a {model.architecture}, which has no parameter "
            "tokens; expected 'block'"
        )


def num_growth_groups(config: DecoderConfig) -> int:
    """Growth groups of a model; 1 where it has no parameter tokens."""
    if not isinstance(config, TokenFormerConfig):
        return 1
    return max(len(config.groups(role)) for role in ROLES)
