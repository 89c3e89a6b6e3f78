"""The section ``data`` of a run configuration: what is trained on, and in which portions. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tokenformer.models.config import PositiveFloat, PositiveInt
from tokenformer.train.batch_sizes import BatchSizes
from tokenformer.train.sections import NonNegativeInt
from tokenformer.validation import Int, StrictModel


class BatchWarmup(StrictModel):
    """A batch that grows linearly from ``from_tokens`` to ``data.batch_tokens`` over the first ``steps`` of a stage."""

    from_tokens: PositiveInt
    steps: PositiveInt


class MixtureComponent(StrictModel):
    """A data directory and its weight, in any unit: its share of the samples is its part of the sum."""

    path: str
    weight: PositiveFloat


class DataConfig(StrictModel):
    """What is trained on. ``path`` is a data directory, relative to the current directory; ``mixture`` is several.

    ``packing``: ``windows`` of the stream, in which documents run through, or whole ``documents``, each attending to
    itself alone. ``num_workers`` processes read the data (0: a thread of the training process); it changes no sample.
    ``batch_tokens`` is the global batch of one optimiser step; ``micro_batch_size`` is how many sequences go
    through the model at once, at most (null: all of them), from which gradient accumulation follows.
    """

    path: str | None = None
    mixture: Annotated[tuple[MixtureComponent, ...], Field(min_length=1)] | None = None
    packing: Literal["windows", "documents"] = "windows"
    sequence_length: PositiveInt
    batch_tokens: PositiveInt
    batch_warmup: BatchWarmup | None = None
    micro_batch_size: PositiveInt | None = None
    num_workers: NonNegativeInt = 0
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.path is None) == (self.mixture is None):
            found = "neither" if self.path is None else "both"
            raise ValueError(f"found {found}, expected exactly one of path, mixture")
        if self.batch_tokens % self.sequence_length:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of sequence_length {self.sequence_length}"
            )
        if self.batch_warmup is not None:
            first = self.batch_warmup.from_tokens
            if first % self.sequence_length or first > self.batch_tokens:
                raise ValueError(
                    f"batch_warmup.from_tokens {first} is not a multiple of sequence_length {self.sequence_length} "
                    f"up to batch_tokens {self.batch_tokens}"
                )
        return self

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences of each step of a stage."""
        full, warmup = self.sequences_per_step, self.batch_warmup
        if warmup is None:
            return BatchSizes(full, full)
        return BatchSizes(full, warmup.from_tokens // self.sequence_length, warmup.steps)

    def tokens_before(self, step: int) -> int:
        """Tokens that the steps 0 to ``step`` - 1 of a stage take."""
        return self.batch_sizes.before(step) * self.sequence_length

    @property
    def sequences_per_step(self) -> int:
        return self.batch_tokens // self.sequence_length

    @property
    def sequences_per_forward(self) -> int:
        return self.micro_batch_size or self.sequences_per_step

    @property
    def components(self) -> tuple[MixtureComponent, ...]:
        """The data directories with their weights; ``path`` alone has weight 1."""
        if self.mixture is not None:
            return self.mixture
        return (MixtureComponent(path=str(self.path), weight=1),)

    @property
    def stream(self) -> tuple[object, ...]:
        """What the order of samples depends on; a sample index means the same only within one stream."""
        parts = tuple((part.path, part.weight) for part in self.components)
        return parts, self.packing, self.sequence_length, self.seed


class DataOverrides(StrictModel):
    """The data fields that a stage may change; a field left out is inherited. ``path`` replaces ``mixture`` and the
    other way round."""

    path: str | None = None
    mixture: Annotated[tuple[MixtureComponent, ...], Field(min_length=1)] | None = None
    packing: Literal["windows", "documents"] | None = None
    sequence_length: PositiveInt | None = None
    batch_tokens: PositiveInt | None = None
    batch_warmup: BatchWarmup | None = None
    micro_batch_size: PositiveInt | None = None
    num_workers: NonNegativeInt | None = None
    seed: Annotated[Int, Field(ge=0, lt=2**32)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _replace_source(cls, values: Any) -> Any:
        if isinstance(values, dict) and ("path" in values) != ("mixture" in values):
            return {"path": None, "mixture": None} | values
        return values
