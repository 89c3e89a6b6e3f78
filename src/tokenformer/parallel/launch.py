"""Which of how many processes this is, as torchrun or SLURM's srun says. No torch here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tokenformer.errors import TokenFormerError

_FIRST_PORT, _PORTS = 20000, 20000


@dataclass(frozen=True)
class Launch:
    """Rank ``rank`` of ``world_size`` processes, ``local_rank`` among those of its node; they meet at
    ``address``:``port``. ``launcher``: ``torchrun``, ``slurm``, or ``none`` for a process by itself."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = "localhost"
    port: int = 0
    launcher: str = "none"


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """What the environment variables of torchrun say, or else those of a SLURM job step.

    Of SLURM only what ``srun`` itself sets counts: a batch script has ``SLURM_NTASKS`` too, but is one process.

    Raises:
        TokenFormerError: variables that are incomplete, or no numbers.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Launch(
            _number(environment, "RANK"),
            _number(environment, "WORLD_SIZE"),
            _number(environment, "LOCAL_RANK"),
            _text(environment, "MASTER_ADDR"),
            _number(environment, "MASTER_PORT"),
            "torchrun",
        )
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        nodes = environment.get("SLURM_STEP_NODELIST") or _text(environment, "SLURM_NODELIST")
        port = _FIRST_PORT + _number(environment, "SLURM_JOB_ID") % _PORTS
        return Launch(
            _number(environment, "SLURM_PROCID"),
            _number(environment, "SLURM_STEP_NUM_TASKS"),
            _number(environment, "SLURM_LOCALID"),
            environment.get("MASTER_ADDR") or first_host(nodes),
            _number(environment, "MASTER_PORT") if environment.get("MASTER_PORT") else port,
            "slurm",
        )
    return Launch()


def is_restart(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun has started these processes again after one was lost (``--max-restarts``)."""
    return environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def first_host(nodes: str) -> str:
    """The first host of SLURM's short form of a list: ``node[003-005,9],other`` -> ``node003``.

    Raises:
        TokenFormerError: no such list.
    """
    match = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?(?:,|$)", nodes)
    if match is None:
        raise TokenFormerError(f"SLURM_STEP_NODELIST: found '{nodes}', expected host names; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def _text(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value:
        raise TokenFormerError(f"{name}: missing among the environment variables of the launcher")
    return value


def _number(environment: Mapping[str, str], name: str) -> int:
    value = _text(environment, name)
    if not value.isdecimal():
        raise TokenFormerError(f"{name}: found '{value}' in the environment, expected a number")
    return int(value)
