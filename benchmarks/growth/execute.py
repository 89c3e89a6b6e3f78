"""One run of a plan, in a worker process: its start, its training by the library, and what it is worth."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from benchmarks.growth.plan import Growth, Plan, Run
from benchmarks.growth.trials import trying

Result = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where runs read and write. ``commit``: of the code, for the record."""

    data: Path
    out: Path
    commit: str

    def run(self, run: Run) -> Path:
        """The run directory."""
        return self.out / "runs" / run.directory


def execute(run: Run, plan: Plan, place: Place, parent: Result | None, *, is_parent: bool) -> Result:
    """Do ``run`` and describe it; ``parent`` is the result of the run that it begins from.

    A run that diverges is a result too: its scores are null. So is one that fails for another reason (``failed``),
    but such a run is tried again the next time.
    """
    began = time.monotonic()
    try:
        with trying(run.trials):
            result = _execute(run, plan, place, parent, is_parent)
        return result | {"wall_seconds": round(time.monotonic() - began, 2)}
    except Exception as error:  # one broken run must not end the others
        description = {"id": run.id, **run.model_dump(mode="json"), "val": None, "test": None}
        reason = f"{type(error).__name__}: {error}"[:600]
        return description | {"failed": True, "error": reason, "parameters": 0, "wall_seconds": 0.0}


def _execute(run: Run, plan: Plan, place: Place, parent: Result | None, is_parent: bool) -> Result:
    from tokenformer.errors import TokenFormerError
    from tokenformer.train.config import RunConfig
    from tokenformer.train.run import train
    from tokenformer.validation import validate

    out = place.run(run)
    start, facts = make_start(run, plan, place, parent)
    values = run_values(run, plan, place, start, facts["flops_per_token"], parent)
    result: Result = {"id": run.id, **run.model_dump(mode="json"), "started": facts.get("growth")}
    result |= {"effective": values, "parameters": facts["parameters"], **_machine(place)}
    try:
        done = train(validate(RunConfig, values, source=run.id), out, resume=True, quiet=True)
        result |= {
            "total_flops": done.state.flops,
            "flops_per_second": _steady_speed(out),
            "tokens": done.state.tokens,
            "train_seconds": done.state.seconds,
            "skipped_steps": done.state.skipped_steps,
            "checkpoint": done.checkpoint.name,
            **_scores(done.model, plan, place),
            **_curves(out),
        }
    except TokenFormerError as error:  # it diverged, which no second try changes
        result |= {"error": str(error)[:300], "val": None, "test": None}
    shutil.rmtree(_own_start(run, place), ignore_errors=True)
    if not is_parent:
        for name in ("checkpoints", "model"):
            shutil.rmtree(out / name, ignore_errors=True)
    return result


def run_values(
    run: Run,
    plan: Plan,
    place: Place,
    start: Path | None,
    flops_per_token: float,
    parent: Result | None,
) -> dict[str, Any]:
    """The configuration of the run, as the library takes it."""
    values = {name: dict(section) for name, section in run.config.items()}
    data = values["data"]
    data |= {"path": str(place.data), "seed": run.seed}
    spent = 0.0 if parent is None else parent["total_flops"]
    steps = max(1, round((run.flops - spent) / (flops_per_token * data["batch_tokens"])))
    every = 10 if run.watch else max(1, steps // plan.curve_points)
    values["evaluation"] = {"every_steps": every, "max_tokens": plan.curve_tokens} | values.get(
        "evaluation", {}
    )
    values["checkpoint"] = {"every_steps": None, "asynchronous": False} | values.get("checkpoint", {})
    values["logging"] = {"every_steps": max(1, steps // 50), "tensorboard": False} | values.get("logging", {})
    values |= {"seed": run.seed, "steps": steps}
    return values | ({"model": run.model} if start is None else {"init_from": str(start)})


def make_start(
    run: Run, plan: Plan, place: Place, parent: Result | None
) -> tuple[Path | None, dict[str, Any]]:
    """The directory that the run begins from (None: the configuration alone says it), and facts of its model."""
    from tokenformer.models.directory import save_model
    from tokenformer.models.registry import build_model, load_config, parse_config

    start = _own_start(run, place)
    shutil.rmtree(start, ignore_errors=True)
    length = run.config["data"]["sequence_length"]
    if run.model is not None:
        fields = {name: value for name, value in run.model.items() if name != "architecture"}
        config = parse_config(fields | {"model_type": run.model["architecture"]}, source=run.id)
        facts = {"flops_per_token": config.flops_per_token(length), "parameters": config.num_parameters()}
        if not run.scales:
            return None, facts
        model = build_model(config, seed=run.seed)
        _scale(model, run.scales)
        save_model(model, start)
        return start, facts
    from tokenformer.train.checkpoint.contents import read_checkpoint, write_checkpoint

    assert parent is not None
    source = place.out / "runs" / _directory_of(parent) / "checkpoints" / parent["checkpoint"]
    if run.growth.only_goes_on:
        config = load_config(source)
        return source, {
            "flops_per_token": config.flops_per_token(length),
            "parameters": config.num_parameters(),
        }
    former = read_checkpoint(source)
    model, moments = _grown(former.model, former.moments, run.growth, run.seed, former.state.step)
    growth = _compare(former.model, model, plan, place, length)
    if run.growth.moments == "reset":
        moments = {}
    write_checkpoint(start, replace(former, model=model, moments=moments, run_config=None))
    facts = {
        "flops_per_token": model.config.flops_per_token(length),
        "parameters": model.config.num_parameters(),
    }
    return start, facts | {"growth": growth | {"flops": parent["total_flops"]}}


def _own_start(run: Run, place: Place) -> Path:
    return place.out / "starts" / run.directory


def _directory_of(result: Result) -> str:
    fields = {name: value for name, value in result.items() if name in Run.model_fields}
    return Run.model_validate(fields).directory


def _scale(model: Any, scales: Mapping[str, float]) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            role = model.role_of(name)
            part = "keys" if "key_tokens" in name else "values" if "value_tokens" in name else ""
            names = {role, part, f"{role}-{part}"} if part else {role}
            parameter.mul_(math.prod(scales.get(known, 1.0) for known in names))


def _grown(
    model: Any, moments: dict[str, Any], growth: Growth, seed: int, step: int
) -> tuple[Any, dict[str, Any]]:
    from tokenformer.growth.grow import grow_model
    from tokenformer.growth.transformer import deepen_transformer, widen_transformer

    if growth.widen is not None:
        wide = widen_transformer(model, growth.widen, noise=growth.noise, seed=seed)
        return wide.model, wide.moments(moments)
    if growth.deepen is not None:
        deep = deepen_transformer(model, growth.deepen, order=growth.order, identity=growth.identity)
        return deep.model, deep.moments(moments)
    if growth.tokens is None:
        return model, moments
    grown = grow_model(model, growth.tokens, seed=seed + 1, step=step)
    _redraw(grown.model, growth, seed)
    return grown.model, grown.moments(moments)


def _redraw(model: Any, growth: Growth, seed: int) -> None:
    """New tokens drawn otherwise than the rule says."""
    import torch

    from tokenformer.layers.pattention import Pattention

    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for layer in (part for part in model.modules() if isinstance(part, Pattention)):
            keys, values = layer.key_tokens[-1], layer.value_tokens[-1]
            values.mul_(growth.value_gain)
            if growth.key_std is not None:
                keys.normal_(0.0, growth.key_std / math.sqrt(layer.in_features), generator=generator)


def _compare(before: Any, after: Any, plan: Plan, place: Place, length: int) -> dict[str, Any]:
    """What growth did to the loss of one fixed validation batch (float32), and the level that the run's own
    validations are to be compared with."""
    import torch

    from tokenformer.growth.measure import logit_change
    from tokenformer.language.data_directory import DataDirectory
    from tokenformer.language.scoring import score
    from tokenformer.language.windows import ValidationWindows

    device = find_device()
    data = DataDirectory.open(place.data)
    windows = ValidationWindows(data.split("validation"), length, 4 * length)
    tokens = torch.stack([torch.from_numpy(windows[i].inputs) for i in range(len(windows))]).to(device)
    before, after = before.to(device), after.to(device)
    fixed = {"sequence_length": length, "device": device}
    losses = [score(model, data, max_tokens=4 * length, **fixed).loss for model in (before, after)]
    with torch.no_grad():
        change = logit_change(before, after, tokens)
    with _autocast(device):
        levels = [
            score(model, data, max_tokens=plan.curve_tokens, **fixed).bits_per_byte
            for model in (before, after)
        ]
    after.to("cpu")
    return {
        "loss_before": losses[0],
        "loss_after": losses[1],
        "relative_change": abs(losses[1] - losses[0]) / losses[0],
        "logit_change": change,
        "level_before": levels[0],
        "level_after": levels[1],
        "parameters_before": before.config.num_parameters(),
    }


def _scores(model_directory: Path, plan: Plan, place: Place) -> dict[str, float | None]:
    """Bits per byte of the end of the run on both splits."""
    from tokenformer.language.data_directory import DataDirectory
    from tokenformer.language.scoring import score
    from tokenformer.models.directory import load_model

    device = find_device()
    data, model = DataDirectory.open(place.data), load_model(model_directory, device=device)
    length = model.config.max_position_embeddings
    found: dict[str, float | None] = {}
    with _autocast(device):
        for split, name in (("validation", "val"), ("test", "test")):
            scored = score(
                model, data, sequence_length=length, split=split, max_tokens=plan.scored_tokens, device=device
            )
            found[name] = scored.bits_per_byte if math.isfinite(scored.nats) else None
    return found


def _curves(out: Path) -> dict[str, Any]:
    from tokenformer.train.metrics import read_metrics

    records = read_metrics(out)
    return {
        "curve": [
            [record["flops"], record["step"], round(record["val_bits_per_byte"], 5)]
            for record in records
            if record.get("val_bits_per_byte") is not None
        ],
        "training_curve": [
            [record["flops"], round(record["loss"], 4)]
            for record in records
            if record.get("loss") is not None
        ],
        "tokens_per_second": [r["tokens_per_second"] for r in records if "tokens_per_second" in r][-1:],
    }


def _steady_speed(out: Path) -> float | None:
    """FLOP/s of the second half of a run, when everything is compiled."""
    from tokenformer.train.metrics import read_metrics

    logged = [record for record in read_metrics(out) if "tokens_per_second" in record]
    first, last = logged[len(logged) // 2 - 1], logged[-1]
    seconds = last["seconds"] - first["seconds"]
    return (last["flops"] - first["flops"]) / seconds if seconds > 0 else None


def find_device() -> Any:
    """CUDA where it is, else the CPU (MPS is not used)."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _autocast(device: Any) -> Any:
    from tokenformer.train.device import autocast, compute_dtype
    from tokenformer.train.sections import PrecisionConfig

    return autocast(compute_dtype(PrecisionConfig(), device), device)


def _machine(place: Place) -> dict[str, str]:
    import torch

    device = find_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {"machine": cast(str, name), "torch": torch.__version__, "commit": place.commit}


def find_commit() -> str:
    """Of the code at hand; ``TOKENFORMER_COMMIT`` where it is no checkout."""
    if given := os.environ.get("TOKENFORMER_COMMIT"):
        return given
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"
