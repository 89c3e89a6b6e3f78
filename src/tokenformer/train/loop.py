"""The steps of one stage: update, log, evaluate, save. What is trained on is the task's affair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import torch

from tokenformer.errors import DataError, ToldElsewhere
from tokenformer.parallel.shard import drop_gathered
from tokenformer.progress import ProgressBar
from tokenformer.train.clock import TrainingClock
from tokenformer.train.config import StageConfig
from tokenformer.train.device import autocast
from tokenformer.train.interrupts import StopRequest
from tokenformer.train.metrics import MetricsLog
from tokenformer.train.micro_batches import MicroBatches
from tokenformer.train.speed import Speed, console_line
from tokenformer.train.spikes import LossSpike, find_spike
from tokenformer.train.state import Rollback, TrainingState
from tokenformer.train.step import TrainStep
from tokenformer.train.window import MetricsWindow


class StageLoop:
    """Runs one stage from ``state`` to its end, or to a stop request.

    ``save`` writes a checkpoint of a state when one is due, or returns false; its argument says whether it must be one,
    as at the end of the stage and when the run ends before. ``poll`` brings the request up to date, at the same place
    of a step on all ranks (its argument says whether this one's data cannot be read any more), and raises what went
    wrong in the background. ``beat`` tells the other ranks the step at hand and what is begun in it. ``say`` prints a
    line for the user.
    """

    def __init__(
        self,
        step: TrainStep,
        stage: StageConfig,
        state: TrainingState,
        *,
        metrics: MetricsLog,
        save: Callable[[TrainingState, bool], bool],
        say: Callable[[str], None],
        request: StopRequest,
        poll: Callable[[bool], None],
        beat: Callable[[int, str], None],
    ) -> None:
        self.step = step
        self.stage = stage
        self.state = state
        self._metrics = metrics
        self._save = save
        self._say = say
        self._request = request
        self._poll = poll
        self._beat = beat
        self._clock = TrainingClock(step.device, state.seconds)
        self._window = MetricsWindow(step.device, stage.stability.max_nonfinite_steps, state)
        self._flops_per_token = step.model.config.flops_per_token(stage.data.sequence_length)
        self._speed = Speed(step.device, step.dtype, step.world.sizes.world)
        self._logged = state
        self._saved_step = state.step
        self._data_error: DataError | None = None

    def run(self, bar: ProgressBar | None) -> TrainingState:
        """Train to the end of the stage, or until asked to stop; everything due is done and saved by then.

        Raises:
            TokenFormerError: several updates in a row were not finite, or the disk refuses.
            LossSpike: the run is to go back to its newest checkpoint.
            DataError: the data cannot be read any more; the last complete step is saved.
        """
        data = self.stage.data
        first_step = self.state.stage_step
        share = self.step.world.share
        micro_batches = MicroBatches(
            self.state.next_sample,
            data.sequences_per_step,
            data.sequences_per_forward,
            share.rank,
            share.ranks,
            sizes=data.batch_sizes,
            first_step=first_step,
        )
        batches = self.step.task.batches(micro_batches, workers=data.num_workers)
        with closing(batches):  # type: ignore[type-var]
            ready = self._read(batches, micro_batches.passes(0))
            self._end_without_data()
            while self.state.stage_step < self.stage.steps and self._request.signal_number is None:
                step, before = self.state.stage_step, self.state.tokens
                result = self.step(self._telling(ready), step, len(ready))
                self._window.add(result)
                self._advance()
                last = self.state.stage_step == self.stage.steps
                ready = self._read(batches, 0 if last else micro_batches.passes(step + 1 - first_step))
                self._do_what_is_due()
                self._end_without_data()
                if bar is not None:
                    bar.advance(self.state.tokens - before)
                    bar.note(f"loss {self._metrics.latest.get('loss', float('nan')):.3f}")
        return self.state

    def _read(self, batches: Iterator[Any], passes: int) -> list[Any]:
        """The micro-batches of the next step. Where a rank's cannot be read, all learn of it here: they end together,
        since a checkpoint takes all of them."""
        self._beat(self.state.step, "reading data")
        ready = []
        try:
            ready = list(islice(batches, passes))
        except DataError as error:
            self._data_error = error
        self._poll(self._data_error is not None)
        return ready

    def _telling(self, batches: list[Any]) -> Iterator[Any]:
        for index, batch in enumerate(batches, 1):
            self._beat(self.state.step, f"computing pass {index}")
            yield batch

    def _end_without_data(self) -> None:
        """Data that cannot be read any more end the run, but not what it has learned."""
        if not self._request.data_failed:
            return
        if self.state.step != self._saved_step:
            self._look_for_spikes()
            self._write_checkpoint(required=True)
        if self._data_error is None:
            raise ToldElsewhere("another rank cannot read its data any more")
        done = (
            f"the run is saved after step {self.state.step}" if self.state.step else "nothing was learned yet"
        )
        raise DataError(
            f"{self._data_error}; {done}: put the data right, then go on with --resume"
        ) from self._data_error

    def _advance(self) -> None:
        sequences = self.stage.data.batch_sizes.at(self.state.stage_step)
        tokens = sequences * self.stage.data.sequence_length
        self.state = self.state.model_copy(
            update={
                "step": self.state.step + 1,
                "stage_step": self.state.stage_step + 1,
                "tokens": self.state.tokens + tokens,
                "flops": self.state.flops + tokens * self._flops_per_token,
                "next_sample": self.state.next_sample + sequences,
            }
        )

    def _do_what_is_due(self) -> None:
        step, last = self.state.step, self.state.stage_step == self.stage.steps
        log = last or step % self.stage.logging.every_steps == 0
        if log or self.step.device.type == "cpu":
            self._window.check(step)
        required = last or self._request.signal_number is not None
        save = required or _due(step, self.stage.checkpoint.every_steps)
        if log or save:
            self._look_for_spikes()
        if log:
            self._log()
        if last or _due(step, self.stage.evaluation.every_steps):
            self._evaluate_or_end()
        if save:
            self._write_checkpoint(required=required)

    def _look_for_spikes(self) -> None:
        """Examine the losses since the last look, before any of them goes into a checkpoint.

        Raises:
            LossSpike: the run is to go back.
        """
        losses, config = self._window.take_losses(), self.stage.stability.spike
        if config is None:
            return
        finite = [(index, loss) for index, loss in enumerate(losses) if math.isfinite(loss)]
        healthy, recent = [loss for _, loss in finite], self.state.recent_losses
        found = find_spike(recent, healthy, config)
        if found is not None:
            index, loss = finite[found[0]]
            rollback = self._rollback(later=len(losses) - index - 1, loss=loss, limit=found[1])
            if config.rollback and len(self.state.rollbacks) < config.max_rollbacks:
                raise LossSpike(rollback)
            self._metrics.write(self.state, {"spike_step": rollback.step, "spike_loss": loss})
            self._say(f"{self.stage.name}, step {rollback.step}: loss spike, {loss:.4g}; training goes on")
        kept = tuple([*recent, *healthy][-config.window :])
        self.state = self.state.model_copy(update={"recent_losses": kept})

    def _rollback(self, *, later: int, loss: float, limit: float) -> Rollback:
        """Of a spike with ``later`` steps after it; where the run goes back to is not known here."""
        state, sizes = self.state, self.stage.data.batch_sizes
        after_spike = sizes.before(state.stage_step) - sizes.before(state.stage_step - later)
        return Rollback(
            stage=state.stage,
            step=state.step - later,
            loss=loss,
            limit=limit,
            to_sample=state.next_sample - after_spike,
        )

    def _write_checkpoint(self, *, required: bool) -> None:
        self._beat(self.state.step, "saving")
        self._count_skipped()
        self.state = self.state.model_copy(update=self._window.state())
        with self._clock.paused():
            saved = self._save(self.state, required)
        if saved:
            self._saved_step = self.state.step

    def _log(self) -> None:
        values = self._window.read()  # waits for the device, so the time is that of finished work
        self._count_skipped()
        state, before = self.state, self._logged
        self._logged = state
        seconds, tokens = state.seconds - before.seconds, state.tokens - before.tokens
        values["lr"] = self.step.learning_rate(state.stage_step - 1)
        flops = state.flops - before.flops
        values |= self._speed.read(tokens, flops, seconds, self.step.recorded_memory)
        data = self.stage.data
        left = data.tokens_before(self.stage.steps) - data.tokens_before(state.stage_step)
        values["seconds_left"] = round(left * seconds / max(tokens, 1), 1)
        if self.state.loss_scale is not None:
            values["loss_scale"] = self.state.loss_scale
        if self.state.skipped_steps:
            values["skipped_steps"] = self.state.skipped_steps
        values.update(self.step.task.counters())
        self._metrics.write(self.state, values)
        self._say(console_line(f"{self.stage.name}, step {self.state.step}", values))

    def _count_skipped(self) -> None:
        skipped = self.state.skipped_steps + self._window.take_skipped()
        scale = self.step.loss_scale.state() if self.step.loss_scale is not None else {}
        self.state = self.state.model_copy(
            update={"skipped_steps": skipped, "seconds": self._clock.read(), **scale}
        )

    def _evaluate_or_end(self) -> None:
        try:
            with self._clock.paused():
                self._evaluate()
        except DataError as error:
            if self.step.world.share.ranks > 1:  # the others do not know
                raise
            self._data_error, self._request.data_failed = error, True

    def _evaluate(self) -> None:
        self._beat(self.state.step, "evaluating")
        model, config = self.step.model, self.stage.evaluation
        with torch.no_grad(), autocast(self.step.dtype, self.step.device):
            values = self.step.task.evaluate(
                model, self.step.device, config.max_tokens, config.batch_size, self.step.world.share
            )
        drop_gathered(model)
        model.train()
        self._metrics.write(self.state, {f"val_{name}": value for name, value in values.items()})
        found = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
        self._say(f"{self.stage.name}, step {self.state.step}: validation {found}")


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
