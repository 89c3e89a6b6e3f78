"""Metrics in Weights & Biases, under the names they have in ``metrics.jsonl``."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenformer.errors import TokenFormerError
from tokenformer.files import read_json, write_json
from tokenformer.train.sections import WandbConfig

ID_FILE = "wandb.json"
"""In a run directory: the id under which the service knows the run."""


def require_wandb() -> None:
    """Refuse a run that asks for Weights & Biases where the package is missing.

    Raises:
        TokenFormerError: names the extra.
    """
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise TokenFormerError(
            "logging.wandb: the package wandb is missing; install it with: pip install 'tokenformer[wandb]'"
        ) from error


class WandbRun:
    """The run of the service that belongs to the run directory ``run``; going on, the same one goes on.

    Args:
        run: the run directory; offline files go to ``wandb/`` in it.
        section: project, name and mode.
        config: the effective configuration, for the service to show.

    Raises:
        TokenFormerError: the service refuses (no login, no network).
    """

    def __init__(self, run: Path, section: WandbConfig, config: Mapping[str, Any]) -> None:
        import wandb

        path = run / ID_FILE
        if not path.exists():
            write_json(path, {"id": secrets.token_hex(4)})
        try:
            self._run = wandb.init(
                project=section.project,
                entity=section.entity,
                name=section.name or run.resolve().name,
                id=read_json(path, "the id of a Weights & Biases run")["id"],
                resume="allow",
                mode=section.mode,
                dir=str(run),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:  # whatever its network and login code raises
            raise TokenFormerError(
                f"logging.wandb: the run could not be opened ({error}); log in with 'wandb login', or set "
                "logging.wandb.mode=offline"
            ) from error
        # our step is a value like the others: a resumed run logs some steps again, which wandb's own cannot
        self._run.define_metric("*", step_metric="step")

    def write(self, counters: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Log one line."""
        self._run.log({**counters, **values})

    def close(self, *, failed: bool) -> None:
        """End the run; ``failed`` marks it so."""
        self._run.finish(exit_code=int(failed))
