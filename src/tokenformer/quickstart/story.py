"""The quickstart: train small, grow, train on, compare with training from scratch, evaluate, generate, report.

Each step leaves its result on disk and is skipped when that is there already, so an interrupted quickstart goes on
where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_json, read_text, write_json, write_text
from tokenformer.generation.config import SamplingConfig
from tokenformer.generation.engine import generate
from tokenformer.growth.measure import logit_change
from tokenformer.language.data_directory import DataDirectory
from tokenformer.language.prepare import prepare
from tokenformer.language.scoring import score
from tokenformer.language.task import LanguageModelingTask
from tokenformer.models.directory import load_model
from tokenformer.quickstart.page import write_report
from tokenformer.quickstart.plan import RUNS, QuickstartPlan, RunName, parse_plan
from tokenformer.quickstart.results import GrowthResult, ModelResult, QuickstartResults
from tokenformer.report.runs import REPORT_FILE, report_run
from tokenformer.train.checkpoint.contents import TrainingCheckpoint, read_checkpoint
from tokenformer.train.checkpoint.export import is_exported
from tokenformer.train.checkpoint.folder import list_checkpoints
from tokenformer.train.device import find_device
from tokenformer.train.grow import grow_directory
from tokenformer.train.micro_batches import MicroBatches
from tokenformer.train.run import train
from tokenformer.train.state import read_state
from tokenformer.validation import validate

PLAN_FILE, RESULTS_FILE, GROWTH_FILE = "plan.yaml", "results.json", "growth.json"

TITLES: dict[RunName, str] = {
    "small": "TokenFormer, small",
    "grown": "TokenFormer, grown",
    "large": "TokenFormer, large from scratch",
    "transformer": "Transformer from scratch",
}


def run_quickstart(
    plan: QuickstartPlan, out: Path | str, *, say: Callable[[str], None] = print, quiet: bool = False
) -> Path:
    """Do the whole story in the directory ``out`` and return the path of its report.

    Raises:
        TokenFormerError: ``out`` holds something else, or a quickstart with another plan.
    """
    out = Path(out)
    _check_runs(plan, out)
    _claim(plan, out)
    begun = time.monotonic()
    data = _prepare(plan, out, say)
    _train(plan, out, "small", say, quiet)
    growth = _grow(plan, out, data, say)
    for name in RUNS[1:]:
        _train(plan, out, name, say, quiet)
    if not (out / RESULTS_FILE).is_file():
        results = QuickstartResults(
            growth=growth, models=[_assess(plan, out, name, data, say) for name in RUNS]
        )
        write_json(out / RESULTS_FILE, results.model_dump(mode="json"))
    results = read_results(out)
    report = write_report(out, plan, results, data.info, TITLES)
    say(f"done in {time.monotonic() - begun:.0f} s")
    return report


def read_results(out: Path) -> QuickstartResults:
    """What a quickstart in ``out`` measured.

    Raises:
        TokenFormerError: the file is missing or damaged.
    """
    path = out / RESULTS_FILE
    return validate(QuickstartResults, read_json(path, "the results of a quickstart"), source=str(path))


def _check_runs(plan: QuickstartPlan, out: Path) -> None:
    for name in RUNS:
        plan.run_config(name, out)


def _claim(plan: QuickstartPlan, out: Path) -> None:
    """Note the plan in a directory that holds nothing yet; accept one that was begun with the same plan."""
    note = out / PLAN_FILE
    if note.is_file() and any(entry != note for entry in out.iterdir()):
        if parse_plan(read_text(note, "the plan of a quickstart"), source=str(note)) != plan:
            raise TokenFormerError(
                f"{out}: holds a quickstart with another plan ({note}); name another --out"
            )
    elif out.exists() and (not out.is_dir() or any(entry != note for entry in out.iterdir())):
        raise TokenFormerError(f"{out}: is there already and holds something else; name another --out")
    else:
        write_text(note, plan.to_yaml())


def _prepare(plan: QuickstartPlan, out: Path, say: Callable[[str], None]) -> DataDirectory:
    if not (out / "data").exists():
        say(f"prepare: {', '.join(plan.corpus)} -> {out / 'data'}")
        prepare(plan.corpus, out / "data", validation_fraction=plan.validation_fraction)
    data = DataDirectory.open(out / "data")
    total = sum(split.utf8_bytes for split in data.info.splits.values())
    say(f"corpus: {total / 1e6:.1f} MB of text, SHA-256 {data.info.corpus_sha256[:16]}")
    return data


def _train(plan: QuickstartPlan, out: Path, name: RunName, say: Callable[[str], None], quiet: bool) -> None:
    config = plan.run_config(name, out)
    if not _is_finished(out, name, config.resolve()[-1].steps):
        say(f"train: {TITLES[name]}")
        train(config, out / name, resume=True, quiet=quiet)
    elif (out / name / REPORT_FILE).is_file():
        return
    report_run(out / name)


def _is_finished(out: Path, name: RunName, steps: int) -> bool:
    checkpoints = list_checkpoints(out / name)
    return (
        bool(checkpoints)
        and read_state(checkpoints[-1]).stage_step >= steps
        and is_exported(checkpoints[-1], out / name)
    )


def _grow(plan: QuickstartPlan, out: Path, data: DataDirectory, say: Callable[[str], None]) -> GrowthResult:
    """Grow the small run's last checkpoint, and show on one batch that the loss did not move."""
    small, start, note = list_checkpoints(out / "small")[-1], out / "grown-start", out / GROWTH_FILE
    if not start.exists():
        grow_directory(small, start, plan.grow)
    if not note.is_file():
        result = _compare(plan, out, data, read_checkpoint(small), read_checkpoint(start))
        write_json(note, result.model_dump(mode="json"))
    result = validate(GrowthResult, read_json(note, "the measured growth"), source=str(note))
    say(
        f"grow: {result.parameters_before:,} -> {result.parameters_after:,} parameters ({plan.grow.init}); loss on the "
        f"same batch {result.loss_before:.6f} -> {result.loss_after:.6f}; logits moved by "
        f"{result.logit_change:.2g} of their spread"
    )
    return result


@torch.no_grad()
def _compare(
    plan: QuickstartPlan,
    out: Path,
    data: DataDirectory,
    before: TrainingCheckpoint,
    after: TrainingCheckpoint,
) -> GrowthResult:
    section = plan.run_config("small", out).data
    task = LanguageModelingTask(data, section.sequence_length, section.seed)
    next_step = MicroBatches(before.state.next_sample, section.sequences_per_step, section.sequences_per_step)
    with closing(task.batches(next_step)) as batches:
        batch = next(batches)
    losses = []
    for model in (before.model.eval(), after.model.eval()):
        total = task.loss(model, batch)
        losses.append(float(total.nats) / int(total.count))
    return GrowthResult(
        parameters_before=before.model.config.num_parameters(),
        parameters_after=after.model.config.num_parameters(),
        loss_before=losses[0],
        loss_after=losses[1],
        logit_change=logit_change(before.model, after.model, batch.inputs),
    )


def _assess(
    plan: QuickstartPlan, out: Path, name: RunName, data: DataDirectory, say: Callable[[str], None]
) -> ModelResult:
    """Score a finished run on held-out files and let it write."""
    config = plan.run_config(name, out)
    device = find_device(config.parallel.device)
    model = load_model(out / name / "model", device=device)
    evaluation = score(
        model,
        data,
        sequence_length=config.data.sequence_length,
        device=device,
        max_tokens=plan.evaluation_tokens,
        progress=f"evaluate {TITLES[name]}",
    )
    tokenizer = data.tokenizer
    new = generate(
        model,
        [tokenizer.encode(plan.prompt)],
        max_new_tokens=plan.new_tokens,
        sampling=SamplingConfig(temperature=0.7, seed=0),
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=tokenizer.vocab_size,
    )
    state = read_state(list_checkpoints(out / name)[-1])
    say(f"evaluate: {TITLES[name]}: {evaluation.bits_per_byte:.4f} bits per byte on held-out files")
    return ModelResult(
        name=name,
        parameters=model.config.num_parameters(),
        steps=state.step,
        tokens=state.tokens,
        flops=state.flops,
        seconds=state.seconds,
        lr=config.optimizer.lr,
        initializer=model.config.initializer,
        bits_per_byte=evaluation.bits_per_byte,
        loss=evaluation.loss,
        bytes_scored=evaluation.bytes,
        sample=plan.prompt + tokenizer.decode(new[0]),
    )
