"""Runs that go on from each other as one curve (``runs/small+runs/larger``), over all that was spent. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from tokenformer.errors import TokenFormerError
from tokenformer.models.paths import is_model_directory
from tokenformer.models.registry import load_config
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.report.curves import Curve, Point, read_curve
from tokenformer.train.config import CONFIG_FILE, load_run_config
from tokenformer.train.metrics import read_metrics


def read_curves(runs: Iterable[Path | str]) -> list[Curve]:
    """The curves of several run directories, or chains of them joined by ``+``, with labels that tell them apart:
    names, or whole paths where two have the same name.

    Raises:
        TokenFormerError: a run that is named twice, and as :func:`~tokenformer.report.curves.read_curve`; of a chain,
            a run directory without its configuration.
    """
    chains = [_parts(run) for run in runs]
    places = [[part.resolve() for part in chain] for chain in chains]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise TokenFormerError(f"{'+'.join(map(str, chains[index]))}: named twice")
    names = [" + ".join(part.name for part in place) for place in places]
    if len(set(names)) < len(names):
        names = [" + ".join(map(str, chain)) for chain in chains]
    return [_read_chain(chain, name) for chain, name in zip(chains, names, strict=True)]


def _parts(run: Path | str) -> list[Path]:
    """A directory whose own name has a ``+`` is one run."""
    if Path(run).exists():
        return [Path(run)]
    parts = str(run).split("+")
    if not all(parts):
        raise TokenFormerError(f"{run}: expected a run directory, or several joined by '+'")
    return [Path(part) for part in parts]


def _read_chain(runs: Sequence[Path], label: str) -> Curve:
    whole = read_curve(runs[0], label)
    for earlier, later in pairwise(runs):
        curve = read_curve(later, label)
        before = _growths(later) - len(curve.growths)  # those that the run did not do itself
        whole = join(whole, curve, counts_anew=_counts_anew(later), grown=before > _growths(earlier))
    return whole


def join(earlier: Curve, later: Curve, *, counts_anew: bool, grown: bool) -> Curve:
    """``later``, which went on from ``earlier``, behind it.

    Args:
        earlier: the curve up to there.
        later: gives the label.
        counts_anew: the counters of ``later`` begin at zero (it began from weights alone), so those at the end of
            ``earlier`` are added to them. Else they went on, and of ``earlier`` what lies behind its start is left out.
        grown: the model was made larger in between, which is marked.
    """
    end = max([*earlier.training, *earlier.validation], key=lambda point: point.flops)
    if counts_anew:
        training, validation = (
            [_add(end, point) for point in line] for line in (later.training, later.validation)
        )
        growths = [end.flops + at for at in later.growths]
        before = earlier
    else:
        training, validation, growths = list(later.training), list(later.validation), list(later.growths)
        first = min(point.flops for point in [*training, *validation])
        before = earlier._replace(
            training=[point for point in earlier.training if point.flops < first],
            validation=[point for point in earlier.validation if point.flops < first],
            growths=[at for at in earlier.growths if at < first],
        )
    kept = [point.flops for point in [*before.training, *before.validation]]
    between = [max(kept)] if grown and kept else []
    return Curve(
        later.label,
        [*before.training, *training],
        [*before.validation, *validation],
        [*before.growths, *between, *growths],
    )


def _add(end: Point, point: Point) -> Point:
    return Point(end.flops + point.flops, end.tokens + point.tokens, end.seconds + point.seconds, point.value)


def _counts_anew(run: Path) -> bool:
    """Whether the run began with counters of zero: its first line then comes after one logging interval at most."""
    config = load_run_config(run / CONFIG_FILE)
    first = read_metrics(run)[0]
    return config.model is not None or first["step"] <= config.resolve()[0].logging.every_steps


def _growths(run: Path) -> int:
    """In the history of the run's model; 0 where there is none."""
    if not is_model_directory(run / "model"):
        return 0
    config = load_config(run / "model")
    return len(config.growth_history) if isinstance(config, TokenFormerConfig) else 0
