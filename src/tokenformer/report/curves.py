"""Loss curves of runs, read from their ``metrics.jsonl``. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenformer.errors import TokenFormerError
from tokenformer.train.metrics import read_metrics

TRAINING, VALIDATION = "loss", "val_bits_per_byte"


class Point(NamedTuple):
    """A value, and what had been spent when it was taken: FLOPs, tokens and seconds over all stages."""

    flops: float
    tokens: int
    seconds: float
    value: float


class Curve(NamedTuple):
    """One line of a figure. ``training`` in nats a token, ``validation`` in bits a byte; ``growths`` are the
    total FLOPs at which the model was made larger."""

    label: str
    training: Sequence[Point]
    validation: Sequence[Point]
    growths: Sequence[float]

    def after(self, earlier: Curve) -> Curve:
        """This curve with the last points of ``earlier`` put before it: it was grown from there."""
        end = max(
            (points[-1].flops for points in (earlier.training, earlier.validation) if points), default=None
        )
        return self._replace(
            training=[*earlier.training[-1:], *self.training],
            validation=[*earlier.validation[-1:], *self.validation],
            growths=[*([] if end is None else [end]), *self.growths],
        )


def read_curve(run: Path | str, label: str | None = None) -> Curve:
    """The curve of a run directory; its name is the label unless one is given.

    Raises:
        TokenFormerError: no metrics there, none that is finite, or lines without their counters.
    """
    run = Path(run)
    records = read_metrics(run)
    try:
        curve = Curve(
            label or run.resolve().name,
            training=_points(records, TRAINING),
            validation=_points(records, VALIDATION),
            growths=[record["flops"] for record in records if "logit_change" in record],
        )
    except KeyError as error:
        raise TokenFormerError(
            f"{run}: metrics.jsonl has a line without {error}, which each must have"
        ) from error
    if not curve.training and not curve.validation:
        raise TokenFormerError(f"{run}: metrics.jsonl holds no '{TRAINING}' and no '{VALIDATION}' yet")
    return curve


def _points(records: Iterable[Mapping[str, Any]], name: str) -> list[Point]:
    return [
        Point(record["flops"], record["tokens"], record["seconds"], record[name])
        for record in records
        if record.get(name) is not None
    ]
