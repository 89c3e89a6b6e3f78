"""A run directory or training checkpoint in numbers."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokenformer.adapters.config import EXPORT_DIRECTORY, is_adapter_directory
from tokenformer.models.config import DecoderConfig
from tokenformer.models.paths import is_model_directory
from tokenformer.models.registry import load_config
from tokenformer.parallel.sizes import check_tensor_split, mesh_sizes
from tokenformer.progress import short_number
from tokenformer.report.inspect_adapter import describe_adapter
from tokenformer.report.inspect_model import config_tables, describe_config, describe_memory, memory_table
from tokenformer.report.tables import Table, byte_size, count
from tokenformer.train.checkpoint.manifest import DamagedCheckpointError, require_whole
from tokenformer.train.config import CONFIG_FILE, RunConfig, StageConfig, load_run_config
from tokenformer.train.ladder import model_configs
from tokenformer.train.memory import stage_setup
from tokenformer.train.metrics import METRICS_FILE, latest_values, read_metrics
from tokenformer.train.state import TrainingState, is_checkpoint, read_state


def is_run_directory(path: Path) -> bool:
    """Whether ``path`` holds the effective configuration of a run."""
    return (path / CONFIG_FILE).is_file()


def describe_run(path: Path, devices: int | None = None) -> tuple[dict[str, Any], list[Table]]:
    """Facts and tables of a run directory; memory is predicted for ``devices``, or those that its mesh asks for.

    Raises:
        TokenFormerError: a damaged configuration, metrics file or checkpoint; a mesh that is not of ``devices``.
    """
    config = load_run_config(path / CONFIG_FILE)
    metrics = read_metrics(path) if (path / METRICS_FILE).is_file() else []
    facts: dict[str, Any] = {
        "kind": "run",
        "path": str(path),
        "config": config.model_dump(mode="json"),
        "stages": _stages(config),
        "metrics": {"lines": len(metrics), "latest": _latest(metrics)},
        "checkpoints": [_checkpoint_facts(found) for found in _checkpoints(path)],
        "training_memory": _training_memory(config, devices),
        "model": None,
    }
    tables = [_run_table(facts, config), _stage_table(facts["stages"])]
    if facts["training_memory"]:
        tables.append(memory_table(facts["training_memory"]))
    if metrics:
        rows = [(name, _value(value)) for name, value in facts["metrics"]["latest"].items()]
        tables.append(Table(f"Latest metrics (of {count(len(metrics))} lines)", ("metric", "value"), rows))
    if facts["checkpoints"]:
        tables.append(_checkpoint_table(facts["checkpoints"]))
    if is_model_directory(path / "model"):
        facts["model"] = {"path": str(path / "model"), **describe_config(load_config(path / "model"))}
        tables += config_tables(facts["model"])
    if is_adapter_directory(path / EXPORT_DIRECTORY):
        facts["adapter"], found = describe_adapter(path / EXPORT_DIRECTORY)
        tables += found
    return facts, tables


def describe_recipe(path: Path, devices: int | None = None) -> tuple[dict[str, Any], list[Table]]:
    """Facts and tables of a recipe: its stages, and the models and memory of training along them, on ``devices`` or
    those that its mesh asks for.

    Raises:
        TokenFormerError: no valid recipe, or its mesh is not of ``devices``.
    """
    config = load_run_config(path)
    facts: dict[str, Any] = {
        "kind": "recipe",
        "path": str(path),
        "config": config.model_dump(mode="json"),
        "stages": _stages(config),
        "training_memory": _training_memory(config, devices),
    }
    tables = [_run_table(facts, config), _stage_table(facts["stages"])]
    if config.model is not None:
        facts["model"] = describe_config(config.model)
        tables += config_tables(facts["model"])
    if facts["training_memory"]:
        tables.append(memory_table(facts["training_memory"]))
    return facts, tables


def describe_checkpoint(path: Path) -> tuple[dict[str, Any], list[Table]]:
    """Facts and tables of a training checkpoint: its counters, size and model, and whether its files are as they were
    written (all are read).

    Raises:
        TokenFormerError: a damaged state or configuration.
    """
    facts = {"kind": "checkpoint", **_checkpoint_facts(path), "damage": _damage(path)}
    facts |= describe_config(load_config(path))
    rows = [(name, _value(value)) for name, value in facts["state"].items()]
    rows.append(("size", byte_size(facts["bytes"])))
    rows.append(("files", facts["damage"] or "as they were written"))
    return facts, [Table(f"training checkpoint: {path}", ("field", "value"), rows), *config_tables(facts)]


def _training_memory(config: RunConfig, devices: int | None) -> list[dict[str, Any]]:
    """Predictions for each stage, where the sizes of its model are known; on a GPU unless the CPU is asked for."""
    if config.model is None:
        return []
    stages, parallel = config.resolve(), config.parallel
    on_cpu = parallel.device == "cpu"
    mesh = (parallel.replicate, parallel.shard, parallel.tensor)
    sizes = mesh_sizes(*mesh, devices or math.prod(size for size in mesh if size != -1))
    predictions = []
    for stage, model in zip(stages, model_configs(config.model, stages), strict=True):
        check_tensor_split(model, sizes.tensor)
        precision = stage.precision
        setup = stage_setup(
            stage,
            dtype=("float32" if on_cpu else "bfloat16") if precision.dtype == "auto" else precision.dtype,
            compiled=not on_cpu if precision.compile == "auto" else precision.compile,
            device_type="cpu" if on_cpu else "cuda",
            sizes=sizes,
            reshard_after_forward=parallel.reshard_after_forward,
        )
        predictions.append(describe_memory(stage.name, model, setup))
    return predictions


def _checkpoints(run: Path) -> list[Path]:
    found = [path for path in (run / "checkpoints").glob("step-*") if is_checkpoint(path)]
    return sorted(found, key=lambda path: read_state(path).step)


def _checkpoint_facts(path: Path) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"path": str(path), "bytes": size, "state": read_state(path).model_dump(mode="json")}


def _damage(path: Path) -> str | None:
    try:
        require_whole(path)
    except DamagedCheckpointError as error:
        return str(error)
    return None


def _stages(config: RunConfig) -> list[dict[str, Any]]:
    stages = config.resolve()
    model = config.model
    flops = [None] * len(stages) if model is None else _cumulative_flops(model, stages)
    return [
        {
            "name": stage.name,
            "steps": stage.steps,
            "tokens": stage.data.tokens_before(stage.steps),
            "grow": None if stage.grow is None else stage.grow.model_dump(mode="json", exclude_none=True),
            "lr": stage.optimizer.lr,
            "schedule": stage.schedule.name,
            "total_flops": total,
        }
        for stage, total in zip(stages, flops, strict=True)
    ]


def _cumulative_flops(model: DecoderConfig, stages: list[StageConfig]) -> list[float]:
    """Total FLOPs of training at the end of each stage, those before it included."""
    per_stage = (
        grown.flops_per_token(stage.data.sequence_length) * stage.data.tokens_before(stage.steps)
        for grown, stage in zip(model_configs(model, stages), stages, strict=True)
    )
    return list(accumulate(per_stage))


def _latest(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The counters of the last line, and the newest value of every metric."""
    if not metrics:
        return {}
    counters = {name: metrics[-1].get(name) for name in TrainingState().counters()}
    return {**counters, **latest_values(metrics)}


def _run_table(facts: dict[str, Any], config: RunConfig) -> Table:
    start = config.init_from if config.model is None else f"fresh {config.model.architecture}"
    rows = [
        ("starts from", str(start)),
        ("data", ", ".join(part.path for part in config.data.components)),
        ("sequence length", count(config.data.sequence_length)),
        ("tokens a step", count(config.data.batch_tokens)),
        (
            "optimizer",
            f"{config.optimizer.name}, lr {config.optimizer.lr:g}, decay {config.optimizer.weight_decay:g}",
        ),
        ("precision", config.precision.dtype),
        ("device", config.parallel.device),
        ("seed", str(config.seed)),
    ]
    return Table(f"{facts['kind']}: {facts['path']}", ("field", "value"), rows)


def _pflop(flops: float) -> str:
    return f"{flops / 1e15:,.0f}" if flops >= 1e17 else f"{flops / 1e15:.3g}"


def _growth(grow: dict[str, Any] | None) -> str:
    fields = (grow or {}).items()
    return ", ".join(f"{name} {value}" for name, value in fields if value != "zero_keys") or "-"


def _stage_table(stages: list[dict[str, Any]]) -> Table:
    rows = [
        (
            stage["name"],
            count(stage["steps"]),
            count(stage["tokens"]),
            _growth(stage["grow"]),
            f"{stage['lr']:g}",
            stage["schedule"],
            "-" if stage["total_flops"] is None else _pflop(stage["total_flops"]),
        )
        for stage in stages
    ]
    columns = ("stage", "steps", "tokens", "grow first", "lr", "schedule", "PFLOP in all")
    return Table("Stages", columns, rows)


def _checkpoint_table(checkpoints: list[dict[str, Any]]) -> Table:
    rows = [
        (
            Path(found["path"]).name,
            count(found["state"]["stage"]),
            count(found["state"]["tokens"]),
            short_number(found["state"]["flops"]),
            byte_size(found["bytes"]),
        )
        for found in checkpoints
    ]
    return Table("Checkpoints", ("checkpoint", "stage", "tokens", "FLOPs", "size"), rows)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return count(value) if isinstance(value, int) else str(value)
