"""Why a model learns fast or slowly: sizes of what flows through it, of its weights and of their gradients, by role."""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.growth.execute import Place, find_device, make_start, run_values
from benchmarks.growth.plan import Plan, Run

Statistics = dict[str, dict[str, float]]


def measure_run(run: Run, plan: Plan, place: Place, steps: int) -> Statistics:
    """Of the model of ``run`` after ``steps`` steps of its training (0: as drawn), by role the mean over layers."""
    from tokenformer.models.directory import load_model
    from tokenformer.models.registry import build_model
    from tokenformer.train.config import RunConfig
    from tokenformer.train.run import train
    from tokenformer.validation import validate

    start, facts = make_start(run, plan, place, None)
    values = run_values(run, plan, place, start, facts["flops_per_token"], None)
    values["steps"] = max(1, steps)
    config = validate(RunConfig, values, source=run.id)
    if steps == 0:
        model = load_model(start) if start is not None else build_model(config.model, seed=run.seed)
    else:
        with tempfile.TemporaryDirectory() as folder:
            model = load_model(train(config, Path(folder) / "run", quiet=True).model)
    return measure(model.to(find_device()), place, config.data.sequence_length, config.optimizer.lr)


def measure(model: Any, place: Place, length: int, lr: float) -> Statistics:
    """Statistics of ``model`` on eight windows of validation text (float32).

    By role: ``input``, ``output`` (root mean squares), ``scores`` (their standard deviation), ``active`` (the effective
    share of parameter tokens, (sum |w|)^2 / (n sum w^2)); by role and part: ``weight`` and ``gradient`` (root mean
    squares), ``update`` (an AdamW step at the peak rate over the weight).
    """
    import torch

    from tokenformer.language.data_directory import DataDirectory
    from tokenformer.language.loss import Batch, loss_sum
    from tokenformer.language.windows import ValidationWindows

    windows = ValidationWindows(DataDirectory.open(place.data).split("validation"), length, 8 * length)
    chosen = [windows[index] for index in range(len(windows))]
    device = find_device()
    batch = Batch(
        *(
            torch.stack([torch.from_numpy(getattr(w, part)) for w in chosen]).to(device)
            for part in ("inputs", "targets")
        )
    )
    found: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with _recorded(model, lambda role, name, value: found[role][name].append(value)):
        loss = loss_sum(model, batch)
        mean = loss.nats / loss.count
        mean.backward()
    found["all"]["loss"] = [mean.item()]
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or parameter.grad is None:
            continue
        part = "keys" if "key_tokens" in name else "values" if "value_tokens" in name else ""
        weight = _rms(parameter)
        entry = found[f"{model.role_of(name)} {part}".strip()]
        for key, value in (("weight", weight), ("gradient", _rms(parameter.grad)), ("update", lr / weight)):
            entry[key].append(value)
    return {
        role: {name: sum(values) / len(values) for name, values in entry.items()}
        for role, entry in found.items()
    }


@contextmanager
def _recorded(model: Any, record: Callable[[str, str, float], None]) -> Iterator[None]:
    from tokenformer.layers.pattention import Pattention

    roles = {
        name: model.role_of(f"{name}.weight")
        for name, _ in model.named_modules()
        if name.endswith(("query", "key", "value", "proj", "ffn")) and name.startswith("blocks.")
    }

    def hook(role: str) -> Callable[..., None]:
        def seen(layer: Any, inputs: Any, output: Any) -> None:
            record(role, "input", _rms(inputs[0]))
            record(role, "output", _rms(output))
            if isinstance(layer, Pattention):
                scores, active = _attention(layer, inputs[0])
                record(role, "scores", scores)
                record(role, "active", active)

        return seen

    handles = [model.get_submodule(name).register_forward_hook(hook(role)) for name, role in roles.items()]
    forwards = _without_shared_products(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        forwards()


def _without_shared_products(model: Any) -> Callable[[], None]:
    """Query, key and value each called by itself, so that hooks see them; returns what undoes it."""
    import tokenformer.layers.attention as attention

    former = attention.project_together
    attention.project_together = lambda layers, x: [layer(x) for layer in layers]  # type: ignore[assignment]

    def undo() -> None:
        attention.project_together = former

    return undo


def _attention(layer: Any, x: Any) -> tuple[float, float]:
    import torch

    from tokenformer.ops.pattention import attention_weights

    with torch.no_grad():
        scores = [x.detach().float() @ keys.detach().float().T for keys in layer.key_tokens]
        weights = torch.cat(attention_weights(scores, layer.kind), -1)
        sums, squares = weights.abs().sum(-1).square(), weights.square().sum(-1)
        active = (sums / squares.clamp_min(1e-30) / weights.shape[-1]).mean()
        return float(torch.cat(scores, -1).std()), float(active)


def _rms(tensor: Any) -> float:
    return math.sqrt(float(tensor.detach().float().square().mean()))


def describe(statistics: Sequence[tuple[str, Statistics]]) -> list[str]:
    """One line for each run and role."""
    lines = []
    for title, found in statistics:
        lines.append(f"== {title}")
        for role, entry in found.items():
            lines.append(f"  {role:14}" + "  ".join(f"{name} {value:.3g}" for name, value in entry.items()))
    return lines
