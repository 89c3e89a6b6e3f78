"""Up the ladder: stage after stage is grown, placed and trained, and its checkpoints are written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from tokenformer.adapters.apply import adapter_parameters
from tokenformer.models.base import LanguageModel
from tokenformer.progress import progress_bar
from tokenformer.train.announce import interruption
from tokenformer.train.checkpoint.contents import TrainingCheckpoint, read_checkpoint
from tokenformer.train.checkpoint.rng import restore_rng, rng_state
from tokenformer.train.checkpoint.writer import CheckpointWriter, writing_mode
from tokenformer.train.config import StageConfig
from tokenformer.train.context import RunContext
from tokenformer.train.loop import StageLoop
from tokenformer.train.metrics import MetricsLog
from tokenformer.train.optimizer import load_named_state, named_state
from tokenformer.train.placement import Placement
from tokenformer.train.rung import grow_for_stage
from tokenformer.train.sections import CheckpointConfig
from tokenformer.train.spikes import passed_over
from tokenformer.train.start import Learned
from tokenformer.train.state import TrainingState
from tokenformer.train.step import TrainStep


class Climb:
    """Trains the stages of ``run``; the ``writer`` of its checkpoints outlives a return to one of them."""

    def __init__(self, run: RunContext) -> None:
        plan = run.plan
        self._run = run
        self._placement = Placement(
            plan.device, run.world, reshard_after_forward=plan.config.parallel.reshard_after_forward
        )
        self._config_text = plan.config.to_yaml()
        mode = writing_mode((stage.checkpoint for stage in plan.stages), plan.device)
        self.writer = CheckpointWriter(plan.out, mode=mode, ranks=run.ranks, say=run.say)

    def train(self, learned: Learned, metrics: MetricsLog) -> TrainingState:
        """Train from ``learned`` to the end of the last stage; everything is written by then.

        Raises:
            RunInterrupted: the run was asked to end, and is saved.
            LossSpike: the run is to go back to its newest checkpoint.
            TokenFormerError: of :class:`~tokenformer.train.loop.StageLoop`, of growth, of the disk.
        """
        plan = self._run.plan
        torch.manual_seed(plan.config.seed)
        restore_rng(learned.rng, plan.device)
        for index in range(learned.state.stage, len(plan.stages)):
            learned.state = self.enter(index, learned.state)
            if learned.state.stage_step == plan.stages[index].steps:
                continue
            self._prepare(index, learned, metrics)
            self._run_stage(index, learned, metrics)
            if self._run.request.signal_number is not None:
                self.writer.finish()
                # a launcher may end all ranks as soon as one has left
                self._run.ranks.first(lambda: None)
                raise interruption(self._run, learned.state)
        self.writer.finish()
        self._run.say(f"{self._run.exported.name}: {self._run.exported}")
        return learned.state

    def enter(self, index: int, state: TrainingState) -> TrainingState:
        """``state`` as stage ``index`` sees it; another data order begins at its first sample."""
        if index == state.stage:
            return state
        stages = self._run.plan.stages
        same = stages[index].data.stream == stages[state.stage].data.stream
        changed = {"stage": index, "stage_step": 0, "next_sample": state.next_sample if same else 0}
        return passed_over(state.model_copy(update=changed))

    def _prepare(self, index: int, learned: Learned, metrics: MetricsLog) -> None:
        """Make the model and the moments those that stage ``index`` begins with, placed."""
        plan, state = self._run.plan, learned.state
        stage, task = plan.stages[index], plan.tasks[index]
        grows = stage.grow is not None and state.stage_step == 0
        if learned.unread is not None:
            if grows:
                whole = read_checkpoint(learned.unread, verify=False)
                learned.model, learned.moments = whole.model, whole.moments
            else:
                learned.model, learned.moments = self._placement.read(learned.unread, learned.model, stage)
            learned.unread = None
        elif not grows:
            model, learned.moments = self._placement.gather(learned.model, learned.moments)
            learned.model = self._placement.place(model, stage)
        if grows:
            rung = grow_for_stage(
                learned.model, learned.moments, stage, task, state, plan.config.seed, self._placement
            )
            self._run.say(f"{stage.name}: {rung.describe()}")
            metrics.write(state, {"parameters": rung.parameters, "logit_change": rung.logit_change})
            learned.model, learned.moments = rung.model, rung.moments

    def _run_stage(self, index: int, learned: Learned, metrics: MetricsLog) -> None:
        run, plan, state = self._run, self._run.plan, learned.state
        stage, task, model, adapter = plan.stages[index], plan.tasks[index], learned.model, plan.adapter
        trained = adapter_parameters(model, adapter.base) if adapter is not None else None
        step = TrainStep(model, task, stage, plan.device, state, run.world, trained)
        load_named_state(model, step.optimizer, learned.moments)
        learned.moments = {}  # the optimiser has copies
        step.optimizer.register_step_pre_hook(lambda *_: self.writer.before_update())
        loop = StageLoop(
            step,
            stage,
            state,
            metrics=metrics,
            save=partial(self._save, model, step.optimizer, stage, metrics.latest),
            say=run.say,
            request=run.request,
            poll=self._poll,
            beat=run.heartbeat.beat,
        )
        total, done = map(stage.data.tokens_before, (stage.steps, state.stage_step))
        shown = nullcontext() if run.quiet else progress_bar(stage.name, total, "tokens", done=done)
        with shown as bar:
            learned.state = loop.run(bar)
        learned.moments = named_state(model, step.optimizer)

    def _poll(self, data_failed: bool) -> None:
        if self._run.request.poll(trouble=self.writer.failed, data_failed=data_failed):
            self.writer.wait()

    def _save(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        stage: StageConfig,
        latest: Mapping[str, Any],
        state: TrainingState,
        required: bool,
    ) -> bool:
        if not required and self._leaves_out(state.step, stage.checkpoint):
            return False
        plan = self._run.plan
        checkpoint = TrainingCheckpoint(
            model=model,
            moments=named_state(model, optimizer),
            state=state,
            tokenizer=plan.tokenizer,
            run_config=self._config_text,
            rng=rng_state(plan.device),
        )
        wanted = stage.checkpoint.export or state.stage_step == stage.steps
        self.writer.write(
            checkpoint, stage.checkpoint, self._run.card(model.config, state, latest) if wanted else None
        )
        return True

    def _leaves_out(self, step: int, policy: CheckpointConfig) -> bool:
        """Whether the checkpoint of ``step`` is left out, because the former one is still being written."""
        if policy.when_busy == "wait" or policy.keeps(step) or not self.writer.is_writing():
            return False
        self._run.say(
            f"step {step}: no checkpoint, the former one is still being written (checkpoint.when_busy: skip)"
        )
        return True
