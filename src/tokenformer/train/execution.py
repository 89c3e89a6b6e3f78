"""A run from its start to its end: the run directory, the way up the ladder, and back where the loss has spiked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tokenformer.files import restore_replaced, write_text
from tokenformer.models.registry import load_config
from tokenformer.train.adapter import write_adapter_run
from tokenformer.train.announce import announce
from tokenformer.train.checkpoint.export import Export, export_model, is_exported
from tokenformer.train.checkpoint.folder import (
    checkpoint_path,
    find_newest_whole,
    remove_remains,
    set_aside,
)
from tokenformer.train.climb import Climb
from tokenformer.train.config import CONFIG_FILE
from tokenformer.train.context import RunContext
from tokenformer.train.metrics import METRICS_FILE, MetricsLog, latest_values, read_metrics
from tokenformer.train.plan import check_optimizers
from tokenformer.train.spikes import LossSpike, after_journal, rolled_back, write_journal
from tokenformer.train.start import Learned, begin, go_on
from tokenformer.train.state import Rollback, TrainingState
from tokenformer.train.wandb_run import require_wandb


class Execution:
    """Does what the plan of ``run`` says."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._plan = run.plan
        self._climb = Climb(run)

    def execute(self) -> tuple[TrainingState, dict[str, Any]]:
        """Train to the end; the last state, and the newest value of each metric.

        Raises:
            TokenFormerError: whatever ends the run.
            RunInterrupted: it was asked to end, and is saved.
        """
        plan = self._plan
        start = self._start(plan.resume_from)
        check_optimizers(plan, start.model)
        if plan.stages[0].logging.wandb is not None:
            require_wandb()
        self._run.ranks.first(self._open_run_directory)
        if self._is_finished(start.state):
            return self._finish_again(start.state)
        announce(self._run, start.model.config, start.state)
        after = start.state if plan.resume_from is not None else None
        with closing(self._climb.writer):
            self._climb.writer.start()
            while True:
                with self._metrics(after) as metrics:
                    try:
                        self._note_rollback(start.state, metrics)
                        return self._climb.train(start, metrics), dict(metrics.latest)
                    except LossSpike as spike:
                        rollback = spike.rollback
                    except Exception:
                        self._climb.writer.abandon()
                        raise
                del start  # both models need not be held at once
                start = self._go_back(rollback)
                after = start.state

    def _metrics(self, after: TrainingState | None) -> MetricsLog:
        logging = self._plan.stages[0].logging
        return MetricsLog(
            self._plan.out,
            tensorboard=logging.tensorboard,
            wandb=logging.wandb,
            config=self._plan.config.model_dump(mode="json"),
            after=after,
            silent=not self._run.world.is_first,
        )

    def _start(self, checkpoint: Path | None) -> Learned:
        plan = self._plan
        start = begin(plan.config, plan.data) if checkpoint is None else go_on(checkpoint)
        start.state = after_journal(plan.out, start.state.model_copy(update={"data": plan.data}))
        return start

    def _go_back(self, rollback: Rollback) -> Learned:
        """The newest checkpoint (or the beginning), past the data of a spike; the journal tells a later process so."""
        self._climb.writer.wait()
        checkpoint = self._run.ranks.first(partial(find_newest_whole, self._plan.out)).path
        start = self._start(checkpoint)
        begins = self._climb.enter(rollback.stage, start.state).next_sample
        rollback = rollback.model_copy(update={"from_step": start.state.step, "from_sample": begins})
        start.state = state = rolled_back(start.state, rollback)
        self._run.ranks.first(partial(write_journal, self._plan.out, state))
        self._run.say(
            f"loss {rollback.loss:.4g} at step {rollback.step} is a spike (limit {rollback.limit:.4g}): back to step "
            f"{state.step}, {rollback.to_sample - rollback.from_sample} samples are left out"
        )
        return start

    def _note_rollback(self, state: TrainingState, metrics: MetricsLog) -> None:
        if state.rollbacks and metrics.latest.get("rollbacks") != len(state.rollbacks):
            last = state.rollbacks[-1]
            values = {"spike_step": last.step, "spike_loss": last.loss, "spike_limit": last.limit}
            skipped = last.to_sample - last.from_sample
            metrics.write(state, {"rollbacks": len(state.rollbacks), **values, "skipped_samples": skipped})

    def _finish_again(self, state: TrainingState) -> tuple[TrainingState, dict[str, Any]]:
        """What is left of a finished run: the export, if the run was stopped just before it."""
        self._run.say(f"{self._plan.out}: this run is finished (step {state.step}); nothing is left to do")
        latest = latest_values(read_metrics(self._plan.out))
        self._run.ranks.first(partial(self._export_if_missing, state, latest))
        return state, latest

    def _export_if_missing(self, state: TrainingState, latest: Mapping[str, Any]) -> None:
        checkpoint = checkpoint_path(self._plan.out, state.step)
        if not is_exported(checkpoint, self._plan.out):
            card = self._run.card(load_config(checkpoint), state, latest)
            export_model(Export(checkpoint, card), self._plan.out)

    def _open_run_directory(self) -> None:
        out = self._plan.out
        remove_remains(out)
        restore_replaced(self._run.exported)
        for path, problem in self._plan.damaged.items():
            self._run.say(
                f"damaged checkpoint: {problem}; it is kept as {set_aside(path).name}, and its steps since "
                f"{self._plan.resume_from and self._plan.resume_from.name} are trained again"
            )
        write_text(out / CONFIG_FILE, self._plan.config.to_yaml())
        if self._plan.resume_from is None:
            (out / METRICS_FILE).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
            if self._plan.adapter is not None:
                write_adapter_run(self._plan.adapter, out)

    def _is_finished(self, state: TrainingState) -> bool:
        return state.stage == len(self._plan.stages) - 1 and state.stage_step >= self._plan.stages[-1].steps
