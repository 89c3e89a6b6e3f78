"""What all tests share: reproducible examples, one thread, small models, and the command line in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings

from tokenformer.cli.main import main
from tokenformer.models.base import LanguageModel
from tokenformer.models.registry import build_model
from tokenformer.models.tokenformer.config import TokenFormerConfig
from tokenformer.models.transformer.config import TransformerConfig

if not torch.cuda.is_available():  # read when a kernel is defined, so before any is
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("default", derandomize=True, deadline=None, database=None, max_examples=25)
settings.load_profile("default")

MakeModel = Callable[..., LanguageModel]


class Finished(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


RunCommand = Callable[..., Finished]
Torchrun = Callable[..., Finished]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Models this small are slower on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference cases and data that lies beside the project."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="session")
def make_tokenformer() -> MakeModel:
    """A tiny TokenFormer in evaluation mode; any field of its configuration by keyword, and ``seed``."""

    def make(*, seed: int = 0, **fields: Any) -> LanguageModel:
        sizes = {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "qkv_param_tokens": 6,
            "proj_param_tokens": 5,
            "ffn_param_tokens": 12,
            "max_position_embeddings": 64,
        }
        return build_model(TokenFormerConfig(**(sizes | fields)), seed=seed).eval()

    return make


@pytest.fixture(scope="session")
def make_transformer() -> MakeModel:
    """A tiny Transformer, likewise."""

    def make(*, seed: int = 0, **fields: Any) -> LanguageModel:
        sizes = {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 64,
        }
        return build_model(TransformerConfig(**(sizes | fields)), seed=seed).eval()

    return make


@pytest.fixture
def run_command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCommand:
    """``run_command("inspect", path)``: the console script's entry point with its arguments, as users run it."""

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["tokenformer", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return Finished(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def torchrun() -> Torchrun:
    """``torchrun(2, "-m", "tokenformer", ...)``: processes that work together on the CPU, as torchrun starts them."""

    def run(processes: int, *command: object, timeout: float = 300) -> Finished:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        ended = subprocess.run(
            [sys.executable, *launcher, *map(str, command)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Finished(ended.returncode, ended.stdout, ended.stderr)

    return run
