"""Commands as users run them, in this process: the console script's entry point with its arguments."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tokenformer.cli.main import main


class Finished(NamedTuple):
    code: int
    out: str
    err: str


RunCommand = Callable[..., Finished]


@pytest.fixture
def run_command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCommand:
    """``run_command("inspect", path)`` -> exit code, standard output, standard error."""

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["tokenformer", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return Finished(code, *capfd.readouterr())

    return run
