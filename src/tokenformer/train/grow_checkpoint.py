"""A training checkpoint to a larger one: weights, moments, counters and data position."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokenformer.files import require_free
from tokenformer.growth.grow import grow_model
from tokenformer.growth.spec import GrowthSpec
from tokenformer.train.checkpoint import TrainingCheckpoint, read_checkpoint, write_checkpoint


def grow_checkpoint(
    source: Path | str, out: Path | str, spec: GrowthSpec, *, seed: int = 0
) -> tuple[TrainingCheckpoint, TrainingCheckpoint]:
    """Write the grown checkpoint ``out``; a run goes on from it with ``init_from``.

    Args:
        source: a checkpoint directory.
        out: the new one; refused when it holds something.
        spec: what to grow.
        seed: draws the new parameter tokens.

    Returns:
        The checkpoint before and after.

    Raises:
        TokenFormerError: a damaged checkpoint, a growth that cannot be, or an output that is taken.
    """
    require_free(out)
    before = read_checkpoint(source)
    grown = grow_model(before.model, spec, seed=seed, step=before.state.step)
    after = replace(before, model=grown.model, moments=grown.moments(before.moments))
    write_checkpoint(out, after)
    return before, after
