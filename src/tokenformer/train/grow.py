"""Growth of what lies on disk: a model directory, or a training checkpoint with its moments and counters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tokenformer.files import require_free
from tokenformer.growth.grow import grow_model
from tokenformer.growth.measure import logit_change
from tokenformer.growth.spec import GrowthSpec, grown_config
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.tokenizers import load_tokenizer
from tokenformer.language.windows import ValidationWindows
from tokenformer.models.base import LanguageModel
from tokenformer.models.card import model_card
from tokenformer.models.config import DecoderConfig
from tokenformer.models.directory import load_model, save_model
from tokenformer.models.paths import resolve_model_directory
from tokenformer.models.registry import load_config
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.progress import short_number
from tokenformer.train.checkpoint.contents import read_checkpoint, write_checkpoint
from tokenformer.train.device import require_memory
from tokenformer.train.state import is_checkpoint

EXACT_TOLERANCE = 1e-6
_SEQUENCES, _LENGTH = 4, 256


@dataclass(frozen=True)
class GrowthReport:
    """What :func:`grow_directory` wrote. ``logit_change`` is the largest change of a logit, in units of the
    logits' spread, on the tokens that ``measured_on`` describes, in the ``dtype`` of the weights."""

    directory: Path
    is_checkpoint: bool
    before: TokenFormerConfig
    after: TokenFormerConfig
    logit_change: float
    measured_on: str
    dtype: torch.dtype

    @property
    def broke_exactness(self) -> bool:
        """Whether an exact growth in float32 moved the function all the same."""
        exact = self.after.growth_history[-1].init == "exact" and self.dtype == torch.float32
        return exact and not self.logit_change <= EXACT_TOLERANCE


def grow_directory(
    source: Path, out: Path, spec: GrowthSpec, *, data: Path | None = None, seed: int = 0
) -> GrowthReport:
    """Write a larger copy of the model directory, run (its ``model/``) or training checkpoint ``source`` to ``out``.

    Args:
        source: stays as it is.
        out: must be free; a model directory, or of a checkpoint a checkpoint: the moments follow, counters and
            data position stay.
        spec: what to do.
        data: a data directory, on whose validation text the change of the logits is measured; random token ids
            by default.
        seed: draws the new tokens (and those random ids).

    Raises:
        TokenFormerError: ``source`` is none of these or cannot grow that way, ``data`` was made with another
            tokenizer, ``out`` holds something.
    """
    require_free(out)
    from_checkpoint = is_checkpoint(source)
    directory = source if from_checkpoint else resolve_model_directory(source)
    config = load_config(directory)
    larger = grown_config(config, spec)  # refuses before any weights are read
    parameters = config.num_parameters() + larger.num_parameters()
    require_memory(
        4 * parameters,
        torch.device("cpu"),
        f"grow: the model and its larger copy, {short_number(parameters)} parameters,",
    )
    tokens, measured_on = _tokens(config, directory, data, seed)
    write = _grow_checkpoint if from_checkpoint else _grow_model_directory
    return write(directory, out, spec, seed, tokens, measured_on)


def _grow_model_directory(
    directory: Path, out: Path, spec: GrowthSpec, seed: int, tokens: Tensor, measured_on: str
) -> GrowthReport:
    model = load_model(directory)
    larger: LanguageModel = grow_model(model, spec, seed=seed).model
    report = _report(model, larger, out, tokens, measured_on, from_checkpoint=False)
    facts = {
        "grown from": directory.resolve().name,
        "parameters before": model.config.num_parameters(),
        "largest change of a logit": f"{report.logit_change:.2g} of their spread, on {measured_on}",
    }
    save_model(
        larger,
        out,
        card=model_card(larger.config, {"Growth": facts}),
        tokenizer=load_tokenizer(directory) if (directory / "tokenizer.json").is_file() else None,
    )
    return report


def _grow_checkpoint(
    directory: Path, out: Path, spec: GrowthSpec, seed: int, tokens: Tensor, measured_on: str
) -> GrowthReport:
    checkpoint = read_checkpoint(directory)
    model = checkpoint.model
    grown = grow_model(model, spec, seed=seed, step=checkpoint.state.step)
    report = _report(model, grown.model, out, tokens, measured_on, from_checkpoint=True)
    # the run that wrote the old one cannot resume from this one, so it does not name that run
    larger = replace(
        checkpoint, model=grown.model, moments=grown.moments(checkpoint.moments), run_config=None
    )
    write_checkpoint(out, larger)
    return report


def _report(
    before: LanguageModel,
    after: LanguageModel,
    out: Path,
    tokens: Tensor,
    measured_on: str,
    *,
    from_checkpoint: bool,
) -> GrowthReport:
    assert isinstance(before.config, TokenFormerConfig)
    assert isinstance(after.config, TokenFormerConfig)
    return GrowthReport(
        out,
        from_checkpoint,
        before.config,
        after.config,
        logit_change(before.eval(), after.eval(), tokens),
        measured_on,
        next(before.parameters()).dtype,
    )


def _tokens(config: DecoderConfig, directory: Path, data: Path | None, seed: int) -> tuple[Tensor, str]:
    """Token ids [b, t] to measure on, and what they are."""
    length = min(_LENGTH, config.max_position_embeddings)
    if data is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(config.vocab_size, (_SEQUENCES, length), generator=generator)
        return ids, f"{ids.numel():,} random token ids"
    opened = DataDirectory.open(data)
    has_tokenizer = (directory / "tokenizer.json").is_file()
    opened.check_model(config, load_tokenizer(directory).sha256 if has_tokenizer else None)
    windows = ValidationWindows(opened.split("validation"), length, _SEQUENCES * length)
    ids = torch.stack([torch.from_numpy(windows[index].inputs) for index in range(len(windows))])
    return ids, f"{windows.num_targets:,} tokens of the validation text of {data}"
