"""A whole run: everything checked first, then stage after stage up the ladder."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenformer.adapters.apply import adapter_parameters
from tokenformer.adapters.config import EXPORT_DIRECTORY
from tokenformer.files import restore_replaced, write_text
from tokenformer.models.base import LanguageModel
from tokenformer.models.card import model_card
from tokenformer.models.config import DecoderConfig
from tokenformer.models.registry import load_config
from tokenformer.parallel.launch import find_launch, is_restart
from tokenformer.parallel.sizes import mesh_sizes
from tokenformer.parallel.world import World, joined, meet
from tokenformer.progress import progress_bar, short_number
from tokenformer.train.adapter import write_adapter_run
from tokenformer.train.card import training_facts
from tokenformer.train.checkpoint.contents import TrainingCheckpoint
from tokenformer.train.checkpoint.export import Export, export_model, is_exported
from tokenformer.train.checkpoint.folder import (
    checkpoint_path,
    find_newest_whole,
    list_checkpoints,
    remove_remains,
    set_aside,
)
from tokenformer.train.checkpoint.ranks import Ranks, all_ranks, greatest_of_all_ranks
from tokenformer.train.checkpoint.rng import restore_rng, rng_state
from tokenformer.train.checkpoint.writer import CheckpointWriter, writes_in_background
from tokenformer.train.config import CONFIG_FILE, RunConfig, StageConfig
from tokenformer.train.device import process_settings, rank_device
from tokenformer.train.heartbeat import Heartbeat
from tokenformer.train.interrupts import RunInterrupted, StopRequest, stop_requests
from tokenformer.train.lock import run_lock
from tokenformer.train.loop import StageLoop
from tokenformer.train.memory_check import forward_passes
from tokenformer.train.metrics import METRICS_FILE, MetricsLog, latest_values, read_metrics
from tokenformer.train.optimizer import Moments, load_named_state, named_state
from tokenformer.train.placement import Placement
from tokenformer.train.plan import RunPlan, check_optimizers, make_plan
from tokenformer.train.rung import grow_for_stage
from tokenformer.train.spikes import LossSpike, after_journal, passed_over, rolled_back, write_journal
from tokenformer.train.start import RunStart, begin, go_on
from tokenformer.train.state import Rollback, TrainingState
from tokenformer.train.step import TrainStep
from tokenformer.train.wandb_run import require_wandb

_MANY_PASSES = 64
"""Of one step: so many are worth a line, since they may not be meant."""


@dataclass(frozen=True)
class RunResult:
    """A finished run. ``metrics`` holds the newest value of each metric: ``loss``, ``val_loss``,
    ``val_bits_per_byte``, ...; ``model`` (with ``adapter``: that) and ``checkpoint`` are directories."""

    out: Path
    model: Path
    checkpoint: Path
    state: TrainingState
    metrics: dict[str, Any]


def train(config: RunConfig, out: Path | str, *, resume: bool = False, quiet: bool = False) -> RunResult:
    """Train as ``config`` says and write the run directory ``out``.

    With ``resume``, and when torchrun has started its processes again, the run goes on from its newest whole
    checkpoint, or starts where there is none; on a CPU the result is bit for bit that of a run that was never
    interrupted.

    Raises:
        TokenFormerError: anything the user can put right; nothing is written for what is found before the start.
        RunInterrupted: (a ``KeyboardInterrupt``) SIGINT, SIGTERM or SIGUSR1 came; the checkpoint is written.
    """
    launch, parallel = find_launch(), config.parallel
    with meet(launch, parallel.timeout_seconds) as store:
        sizes = mesh_sizes(parallel.replicate, parallel.shard, parallel.tensor, launch.world_size)
        device = rank_device(parallel.device, launch)
        with (
            joined(launch, store, sizes, device, parallel.timeout_seconds) as world,
            Heartbeat(store, launch.rank, launch.world_size, parallel.timeout_seconds) as heartbeat,
            heartbeat.explaining(),
            ExitStack() as stack,
        ):
            ranks = all_ranks()
            ranks.first(lambda: stack.enter_context(run_lock(Path(out))))
            resume = resume or is_restart()
            return _train(config, Path(out), device, world, ranks, heartbeat, resume=resume, quiet=quiet)


def _train(
    config: RunConfig,
    out: Path,
    device: torch.device,
    world: World,
    ranks: Ranks,
    heartbeat: Heartbeat,
    *,
    resume: bool,
    quiet: bool,
) -> RunResult:
    plan = make_plan(config, out, device, resume=resume, sizes=world.sizes, ranks=ranks)
    quiet = quiet or not world.is_first
    deterministic = any(stage.precision.deterministic for stage in plan.stages)
    cuda = [plan.device] if plan.device.type == "cuda" else []
    with (
        process_settings(config.parallel, deterministic=deterministic),
        torch.random.fork_rng(devices=cuda),
        stop_requests(greatest_of_all_ranks()) as request,
    ):
        say: Callable[[str], None] = (lambda text: None) if quiet else partial(print, flush=True)
        return _Run(plan, request, world, ranks, heartbeat, say, quiet).execute()


class _Run:
    def __init__(
        self,
        plan: RunPlan,
        request: StopRequest,
        world: World,
        ranks: Ranks,
        heartbeat: Heartbeat,
        say: Callable[[str], None],
        quiet: bool,
    ) -> None:
        self.plan = plan
        self.world = world
        self.placement = Placement(
            plan.device, world, reshard_after_forward=plan.config.parallel.reshard_after_forward
        )
        self.request = request
        self.ranks = ranks
        self.heartbeat = heartbeat
        self.say = say
        self.quiet = quiet
        self.config_text = plan.config.to_yaml()
        background = any(writes_in_background(stage.checkpoint, plan.device) for stage in plan.stages)
        self.writer = CheckpointWriter(plan.out, plan.device, background=background, ranks=ranks, say=say)

    def execute(self) -> RunResult:
        plan = self.plan
        start = self._start(plan.resume_from)
        check_optimizers(plan, start.model)
        logging = plan.stages[0].logging
        if logging.wandb is not None:
            require_wandb()
        self.ranks.first(self._open_run_directory)
        if self._is_finished(start.state):
            return self._finish_again(start.state)
        self._announce(start)
        after = start.state if plan.resume_from is not None else None
        while True:
            with MetricsLog(
                plan.out,
                tensorboard=logging.tensorboard,
                wandb=logging.wandb,
                config=plan.config.model_dump(mode="json"),
                after=after,
                silent=not self.world.is_first,
            ) as metrics:
                try:
                    self._note_rollback(start.state, metrics)
                    return self._climb(start, metrics)
                except LossSpike as spike:
                    rollback = spike.rollback
                except Exception:
                    self.writer.abandon()
                    raise
            del start  # both models need not be held at once
            start = self._go_back(rollback)
            after = start.state

    def _start(self, checkpoint: Path | None) -> RunStart:
        start = begin(self.plan.config) if checkpoint is None else go_on(checkpoint)
        return replace(start, state=after_journal(self.plan.out, start.state))

    def _go_back(self, rollback: Rollback) -> RunStart:
        """The newest checkpoint (or the beginning), past the data of a spike; the journal tells a later process so."""
        self.writer.wait()
        checkpoint = self.ranks.first(partial(find_newest_whole, self.plan.out)).path
        start = self._start(checkpoint)
        begins = self._enter(rollback.stage, start.state).next_sample
        rollback = rollback.model_copy(update={"from_step": start.state.step, "from_sample": begins})
        state = rolled_back(start.state, rollback)
        self.ranks.first(partial(write_journal, self.plan.out, state))
        self.say(
            f"loss {rollback.loss:.4g} at step {rollback.step} is a spike (limit {rollback.limit:.4g}): back to step "
            f"{state.step}, {rollback.to_sample - rollback.from_sample} samples are left out"
        )
        return replace(start, state=state)

    def _note_rollback(self, state: TrainingState, metrics: MetricsLog) -> None:
        if state.rollbacks and metrics.latest.get("rollbacks") != len(state.rollbacks):
            last = state.rollbacks[-1]
            values = {"spike_step": last.step, "spike_loss": last.loss, "spike_limit": last.limit}
            skipped = last.to_sample - last.from_sample
            metrics.write(state, {"rollbacks": len(state.rollbacks), **values, "skipped_samples": skipped})

    def _finish_again(self, state: TrainingState) -> RunResult:
        """What is left of a finished run: the export, if the run was stopped just before it."""
        self.say(f"{self.plan.out}: this run is finished (step {state.step}); nothing is left to do")
        latest = latest_values(read_metrics(self.plan.out))
        self.ranks.first(partial(self._export_if_missing, state, latest))
        return self._result(state, latest)

    def _export_if_missing(self, state: TrainingState, latest: Mapping[str, Any]) -> None:
        checkpoint = checkpoint_path(self.plan.out, state.step)
        if not is_exported(checkpoint, self.plan.out):
            export_model(
                Export(checkpoint, self._card(load_config(checkpoint), state, latest)), self.plan.out
            )

    def _open_run_directory(self) -> None:
        out = self.plan.out
        remove_remains(out)
        restore_replaced(self._exported)
        for path, problem in self.plan.damaged.items():
            self.say(
                f"damaged checkpoint: {problem}; it is kept as {set_aside(path).name}, and its steps since "
                f"{self.plan.resume_from and self.plan.resume_from.name} are trained again"
            )
        write_text(out / CONFIG_FILE, self.config_text)
        if self.plan.resume_from is None:
            (out / METRICS_FILE).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
            if self.plan.adapter is not None:
                write_adapter_run(self.plan.adapter, out)

    def _climb(self, start: RunStart, metrics: MetricsLog) -> RunResult:
        torch.manual_seed(self.plan.config.seed)
        restore_rng(start.rng, self.plan.device)
        model, moments, state = start.model, start.moments, start.state
        for index in range(state.stage, len(self.plan.stages)):
            state = self._enter(index, state)
            if state.stage_step == self.plan.stages[index].steps:
                continue
            model, moments, state = self._run_stage(index, model, moments, state, metrics)
            if self.request.signal_number is not None:
                self.writer.finish()
                self.ranks.first(lambda: None)  # a launcher may end all ranks as soon as one has left
                raise self._interruption(state)
        self.writer.finish()
        self.say(f"{self._exported.name}: {self._exported}")
        return self._result(state, metrics.latest)

    def _enter(self, index: int, state: TrainingState) -> TrainingState:
        """``state`` as stage ``index`` sees it; another data order begins at its first sample."""
        if index == state.stage:
            return state
        same = self.plan.stages[index].data.stream == self.plan.stages[state.stage].data.stream
        changed = {"stage": index, "stage_step": 0, "next_sample": state.next_sample if same else 0}
        return passed_over(state.model_copy(update=changed))

    def _run_stage(
        self, index: int, model: LanguageModel, moments: Moments, state: TrainingState, metrics: MetricsLog
    ) -> tuple[LanguageModel, Moments, TrainingState]:
        stage, task = self.plan.stages[index], self.plan.tasks[index]
        if stage.grow is not None and state.stage_step == 0:
            rung = grow_for_stage(model, moments, stage, task, state, self.plan.config.seed, self.placement)
            self.say(f"{stage.name}: {rung.describe()}")
            metrics.write(state, {"parameters": rung.parameters, "logit_change": rung.logit_change})
            model, moments = rung.model, rung.moments
        else:
            model, moments = self.placement.gather(model, moments)
            model = self.placement.place(model, stage)
        adapter = self.plan.adapter
        trained = adapter_parameters(model, adapter.base) if adapter is not None else None
        step = TrainStep(model, task, stage, self.plan.device, state, self.world, trained)
        load_named_state(model, step.optimizer, moments)
        loop = StageLoop(
            step,
            stage,
            state,
            metrics=metrics,
            save=partial(self._save, model, step.optimizer, stage, metrics.latest),
            say=self.say,
            request=self.request,
            poll=self._poll,
            beat=self.heartbeat.beat,
        )
        total, done = map(stage.data.tokens_before, (stage.steps, state.stage_step))
        shown = nullcontext() if self.quiet else progress_bar(stage.name, total, "tokens", done=done)
        with shown as bar:
            state = loop.run(bar)
        return model, named_state(model, step.optimizer), state

    def _poll(self, data_failed: bool) -> None:
        if self.request.poll(trouble=self.writer.failed, data_failed=data_failed):
            self.writer.wait()

    def _save(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        stage: StageConfig,
        latest: Mapping[str, Any],
        state: TrainingState,
    ) -> None:
        checkpoint = TrainingCheckpoint(
            model=model,
            moments=named_state(model, optimizer),
            state=state,
            tokenizer=self.plan.tokenizer,
            run_config=self.config_text,
            rng=rng_state(self.plan.device),
        )
        wanted = stage.checkpoint.export or state.stage_step == stage.steps
        self.writer.write(
            checkpoint, stage.checkpoint, self._card(model.config, state, latest) if wanted else None
        )

    def _card(self, config: DecoderConfig, state: TrainingState, latest: Mapping[str, Any]) -> str:
        data = self.plan.tasks[state.stage].data
        facts = training_facts(data, self.plan.stages, state, latest)
        return (
            model_card(config, facts) if self.plan.adapter is None else self.plan.adapter.card(config, facts)
        )

    @property
    def _exported(self) -> Path:
        """What the run leaves for others."""
        return self.plan.out / ("model" if self.plan.adapter is None else EXPORT_DIRECTORY)

    def _is_finished(self, state: TrainingState) -> bool:
        return state.stage == len(self.plan.stages) - 1 and state.stage_step >= self.plan.stages[-1].steps

    def _result(self, state: TrainingState, latest: Mapping[str, Any]) -> RunResult:
        out = self.plan.out
        return RunResult(out, self._exported, checkpoint_path(out, state.step), state, dict(latest))

    def _interruption(self, state: TrainingState) -> RunInterrupted:
        assert self.request.signal_number is not None
        name = signal.Signals(self.request.signal_number).name
        saved = list_checkpoints(self.plan.out)
        where = f"checkpoint: {saved[-1]}; go on" if saved else "nothing was learned yet; start again"
        return RunInterrupted(
            self.request.signal_number, f"stopped by {name} after step {state.step}; {where} with --resume"
        )

    def _announce(self, start: RunStart) -> None:
        model, state = start.model, start.state
        parameters = short_number(model.config.num_parameters())
        opening = "goes on" if self.plan.resume_from is not None else "starts"
        self.say(
            f"{self.plan.out}: {opening} at step {state.step} with {model.config.class_name}, {parameters} parameters, "
            f"on {self.plan.device}{self._describe_ranks()}"
        )
        if (adapter := self.plan.adapter) is not None:
            trained = model.config.num_parameters() - adapter.base.config.num_parameters()
            self.say(
                f"adapter of {adapter.base.name}: {short_number(trained)} parameters are trained, the rest stays"
            )
        passes = forward_passes(self.plan.stages[state.stage], self.world.sizes)
        if passes >= _MANY_PASSES:
            self.say(f"each step takes {passes} forward passes (data.batch_tokens, data.micro_batch_size)")

    def _describe_ranks(self) -> str:
        sizes = self.world.sizes
        if sizes.world == 1:
            return ""
        axes = ", ".join(f"{axis} {size}" for axis, size in sizes._asdict().items())
        return f" and {sizes.world - 1} more ({axes})"
