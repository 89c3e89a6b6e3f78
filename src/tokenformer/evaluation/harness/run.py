"""Zero-shot evaluation of a model directory with lm-evaluation-harness."""

from __future__ import annotations

import datetime
import logging
import math
import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from tokenformer.errors import TokenFormerError
from tokenformer.evaluation.harness.find_tasks import find_tasks
from tokenformer.evaluation.harness.model import TokenFormerLM
from tokenformer.models.fingerprint import weights_sha256

BOOTSTRAP_ITERATIONS = 1000


class TaskScore(NamedTuple):
    """One measure of a task. ``samples`` were scored; ``stderr`` is None where the harness gives none."""

    task: str
    version: str
    num_fewshot: int | None
    samples: int | None
    metric: str
    value: float
    stderr: float | None


class HarnessResult(NamedTuple):
    """All measures of all tasks, and what they were made with."""

    model: Path
    scores: list[TaskScore]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Settings first, then ``results``: task -> version, number of examples, and measures by name."""
        results: dict[str, dict[str, Any]] = {}
        for score in self.scores:
            task = results.setdefault(
                score.task,
                {"version": score.version, "num_fewshot": score.num_fewshot, "samples": score.samples},
            )
            task[score.metric] = score.value if math.isfinite(score.value) else None
            if score.stderr is not None:
                task[f"{score.metric}_stderr"] = score.stderr
        return {**self.settings, "results": results}


def evaluate_tasks(
    model: Path | str,
    tasks: Sequence[str],
    *,
    adapters: Sequence[Path] = (),
    include_paths: Sequence[Path] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> HarnessResult | None:
    """Run tasks of the harness; None on all but the first of several processes (torchrun).

    Args:
        model: a model directory with a tokenizer, or a run directory.
        tasks: names the harness knows, names from ``include_paths``, or ``lambada_jsonl=FILE``.
        adapters: directories of adapters of the model, or their runs.
        include_paths: folders with task files in the harness's form.
        num_fewshot: examples before each question, where a task does not fix that.
        limit: only the first so many documents of each task.
        batch_size: sequences at a time; by default as many as make up a good number of tokens.
        max_length: tokens the model may see; by default its context.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        TokenFormerError: an unknown task (with the nearest), a dataset that cannot be had, a damaged model, or
            scores that are not finite.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager, wanted = find_tasks(tasks, include_paths)
    harness_model = TokenFormerLM(
        model, device=device, dtype=dtype, batch_size=batch_size, max_length=max_length, adapter=adapters
    )
    loaded = _load(manager, wanted)
    _prepare(loaded["tasks"].values(), num_fewshot)
    with _quiet():
        found: Mapping[str, Any] | None = lm_eval.evaluate(
            lm=harness_model,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=False,
        )
    if found is None:
        return None
    settings = {
        "model": str(harness_model.path),
        "model_sha256": weights_sha256(harness_model.path),
        "adapters": [str(path) for path in harness_model.adapters],
        "harness": "lm-evaluation-harness",
        "harness_version": version("lm_eval"),
        "tokenformer_version": version("tokenformer"),
        "torch_version": torch.__version__,
        "dtype": harness_model.dtype,
        "device": harness_model.model.embedding.weight.device.type,  # type: ignore[union-attr]
        "processes": harness_model.world_size,
        "batch_size": harness_model.batch_size or "auto",
        "max_length": harness_model.max_length,
        "limit": limit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    result = HarnessResult(harness_model.path, list(_scores(found)), settings)
    _require_numbers(result)
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """What the harness prints beside its result goes to standard error, and nowhere without a terminal."""
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(sys.stderr if sys.stderr.isatty() else nowhere),
    ):
        yield


def _load(manager: Any, wanted: Sequence[str | dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tasks, and groups of them, by name, with their data: one out of reach is said before anything is scored."""
    try:
        loaded: dict[str, dict[str, Any]] = manager.load(list(wanted))
    except Exception as error:  # the hub's and the datasets library's own types, and plain ones
        names = ", ".join(name if isinstance(name, str) else name["task"] for name in wanted)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TokenFormerError(
            f"tasks: {names}: the data could not be loaded ({type(error).__name__}: {reason}); the harness reads it "
            "from the Hugging Face hub. With local files, describe them in a task file and name its folder with "
            "--include-path, or use lambada_jsonl=FILE"
        ) from error
    return loaded


def _prepare(tasks: Iterable[Any], num_fewshot: int | None) -> None:
    """Seeds and examples before each question, as ``lm_eval.simple_evaluate`` sets them; that also collects facts about
    the machine, which takes many seconds, and asks git for a version on standard error."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002  # tasks draw from the global one
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks:
        by_default = task.get_config("num_fewshot")
        if by_default is None or (num_fewshot is not None and by_default != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _scores(found: Mapping[str, Any]) -> list[TaskScore]:
    scores = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            spread = values.get(f"{metric}_stderr,{filter_name}")
            scores.append(
                TaskScore(
                    task=task,
                    version=str(found["versions"].get(task, "")),
                    num_fewshot=found["n-shot"].get(task),
                    samples=found.get("n-samples", {}).get(task, {}).get("effective"),
                    metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                    value=float(value),
                    stderr=float(spread)
                    if isinstance(spread, int | float) and math.isfinite(spread)
                    else None,
                )
            )
    return scores


def _require_numbers(result: HarnessResult) -> None:
    for score in result.scores:
        if math.isnan(score.value):
            raise TokenFormerError(
                f"{result.model}: {score.task}: {score.metric} is not a number; the model's weights may be damaged"
            )
