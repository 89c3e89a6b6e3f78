"""A whole run: the processes meet, everything is checked first, then it is carried out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenformer.parallel.launch import find_launch, is_restart
from tokenformer.parallel.sizes import mesh_sizes
from tokenformer.parallel.world import World, joined, meet
from tokenformer.train.checkpoint.folder import checkpoint_path
from tokenformer.train.checkpoint.ranks import Ranks, all_ranks, greatest_of_all_ranks
from tokenformer.train.config import RunConfig
from tokenformer.train.context import RunContext
from tokenformer.train.device import process_settings, rank_device
from tokenformer.train.execution import Execution
from tokenformer.train.heartbeat import Heartbeat
from tokenformer.train.interrupts import stop_requests
from tokenformer.train.lock import run_lock
from tokenformer.train.plan import make_plan
from tokenformer.train.state import TrainingState


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
        context = RunContext(plan, request, world, ranks, heartbeat, say, quiet)
        state, latest = Execution(context).execute()
        return RunResult(out, context.exported, checkpoint_path(out, state.step), state, latest)
