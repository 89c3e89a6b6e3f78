"""The ``tokenformer`` command. Commands import what they need when they run, so ``--help`` is instant."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

from tokenformer.errors import LostRankError, TokenFormerError, ToldElsewhere

app = typer.Typer(
    name="tokenformer",
    help="Sequence models that grow: train a TokenFormer, make it larger without losing anything, go on.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tokenformer {version('tokenformer')}")
        raise typer.Exit


@app.callback()
def _options(
    _debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass  # both are acted on elsewhere: main takes --debug out before parsing, the version has its callback


def _register() -> None:
    from tokenformer.cli import convert, evaluate, generate, grow, inspect, prepare, quickstart, report, train

    for module in (quickstart, prepare, train, grow, evaluate, generate, convert, inspect, report):
        module.register(app)


def main() -> None:
    """Entry point: run the command; a :class:`TokenFormerError` becomes one message and an exit code."""
    if not app.registered_commands:
        _register()
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name="tokenformer")
    except Exception as error:
        message = _explain(error)
        if debug or message is None:
            raise
        if not isinstance(error, ToldElsewhere):
            console = Console(stderr=True, highlight=False, soft_wrap=True)
            console.print("error:", style="bold red", end=" ")
            console.print(message, markup=False)
        code = error.exit_code if isinstance(error, TokenFormerError) else TokenFormerError.exit_code
        if code == LostRankError.exit_code:
            _leave_at_once(code)
        sys.exit(code)


def _leave_at_once(code: int) -> None:
    """The device may still wait for the lost rank, and the interpreter's end for the device."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_LESS = "choose smaller sizes, or fewer sequences at a time (data.micro_batch_size, --batch-size)"


def _explain(error: Exception) -> str | None:
    """The one message for what a user can put right, None for a fault of ours."""
    if isinstance(error, TokenFormerError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    # torch has a type of its own for a full GPU, and none for full main memory
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({str(error).splitlines()[0] if str(error) else 'no more was given'}); {_LESS}"
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return f"out of memory; {_LESS}"
    return None
