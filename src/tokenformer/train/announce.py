"""What a run says about itself when it starts, and when it is asked to end."""

from __future__ import annotations

import signal

from tokenformer.models.config import DecoderConfig
from tokenformer.parallel.sizes import MeshSizes
from tokenformer.progress import short_number
from tokenformer.train.checkpoint.folder import list_checkpoints
from tokenformer.train.context import RunContext
from tokenformer.train.interrupts import RunInterrupted
from tokenformer.train.memory_check import forward_passes
from tokenformer.train.state import TrainingState

_MANY_PASSES = 64
"""Of one step: so many are worth a line, since they may not be meant."""


def announce(run: RunContext, config: DecoderConfig, state: TrainingState) -> None:
    """Say what is trained from ``state`` on, and on what."""
    plan = run.plan
    opening = "goes on" if plan.resume_from is not None else "starts"
    run.say(
        f"{plan.out}: {opening} at step {state.step} with {config.class_name}, "
        f"{short_number(config.num_parameters())} parameters, on {plan.device}{_describe_ranks(run.world.sizes)}"
    )
    if (adapter := plan.adapter) is not None:
        trained = config.num_parameters() - adapter.base.config.num_parameters()
        run.say(
            f"adapter of {adapter.base.name}: {short_number(trained)} parameters are trained, the rest stays"
        )
    passes = forward_passes(plan.stages[state.stage], run.world.sizes)
    if passes >= _MANY_PASSES:
        run.say(f"each step takes {passes} forward passes (data.batch_tokens, data.micro_batch_size)")


def interruption(run: RunContext, state: TrainingState) -> RunInterrupted:
    """The end of a run that was asked to stop; it is saved, unless nothing was learned."""
    assert run.request.signal_number is not None
    name = signal.Signals(run.request.signal_number).name
    saved = list_checkpoints(run.plan.out)
    where = f"checkpoint: {saved[-1]}; go on" if saved else "nothing was learned yet; start again"
    return RunInterrupted(
        run.request.signal_number, f"stopped by {name} after step {state.step}; {where} with --resume"
    )


def _describe_ranks(sizes: MeshSizes) -> str:
    if sizes.world == 1:
        return ""
    axes = ", ".join(f"{axis} {size}" for axis, size in sizes._asdict().items())
    return f" and {sizes.world - 1} more ({axes})"
