"""What the model card of a trained model says beyond its sizes: data, steps, stages, evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenformer.language.data_directory import DatasetInfo
from tokenformer.language.data_mixture import DataMixture
from tokenformer.train.config import StageConfig
from tokenformer.train.state import TrainingState

Facts = dict[str, dict[str, object]]


def training_facts(
    data: DataMixture, stages: Sequence[StageConfig], state: TrainingState, metrics: Mapping[str, Any]
) -> Facts:
    """Sections of :func:`~tokenformer.models.card.model_card`; ``metrics`` are the newest values of each."""
    facts: Facts = {}
    for part, share in zip(data.components, data.shares, strict=True):
        title = "Data" if len(data.components) == 1 else f"Data: {part.name}, {share:.4g} of the samples"
        facts[title] = _data(part.data.info)
    facts["Training"] = _training(state)
    for index, stage in enumerate(stages[: state.stage + 1]):
        facts[f"Stage {index}"] = _stage(stage, done=index < state.stage, state=state)
    evaluation = {name[4:]: value for name, value in metrics.items() if name.startswith("val_")}
    if evaluation:
        facts["Evaluation on the validation split"] = {
            name.replace("_", " "): round(value, 4) if isinstance(value, float) else value
            for name, value in evaluation.items()
        }
    return facts


def _data(info: DatasetInfo) -> dict[str, object]:
    counts = {f"{name} tokens": split.tokens for name, split in info.splits.items()}
    return {
        "sources": ", ".join(info.sources),
        **counts,
        "tokenizer": info.tokenizer,
        "corpus SHA-256": f"`{info.corpus_sha256}`",
    }


def _training(state: TrainingState) -> dict[str, object]:
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "FLOPs": f"{state.flops:.4g}",
        "seconds": round(state.seconds),
        "skipped steps": state.skipped_steps,
    }


def _stage(stage: StageConfig, *, done: bool, state: TrainingState) -> dict[str, object]:
    values: dict[str, object] = {
        "name": stage.name,
        "steps": stage.steps if done else state.stage_step,
        "batch tokens": stage.data.batch_tokens,
        "sequence length": stage.data.sequence_length,
        "peak learning rate": f"{stage.optimizer.lr:g}",
        "schedule": stage.schedule.name,
    }
    if stage.grow is not None:
        values["grown first"] = stage.grow.init
    return values
