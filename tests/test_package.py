"""The package as it is imported: quick, and without what a call may never need."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

import tokenformer

HEAVY = {
    "torch",
    "numpy",
    "grain",
    "jax",
    "matplotlib",
    "tokenizers",
    "tensorboard",
    "safetensors",
    "transformers",
}
COMMANDS = ["quickstart", "prepare", "train", "grow", "evaluate", "generate", "convert", "inspect", "report"]


def loaded_after(code: str) -> set[str]:
    """The heavy modules that a fresh interpreter holds after ``code``."""
    report = "import json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


def run_help(*arguments: str) -> str:
    lines = [
        "import sys",
        f"sys.argv = ['tokenformer', *{list(arguments)!r}]",
        "from tokenformer.cli.main import main",
        "try:",
        "    main()",
        "except SystemExit as ended:",
        "    assert not ended.code, ended.code",
    ]
    return "\n".join(lines)


def test_import_loads_nothing_heavy() -> None:
    assert loaded_after("import tokenformer; dir(tokenformer)") == set()


def test_torch_free_parts_stay_free() -> None:
    assert (
        loaded_after("from tokenformer import TokenFormerConfig, TransformerConfig, TokenFormerError")
        == set()
    )
    assert (
        loaded_after("import tokenformer.growth.spec, tokenformer.models.registry, tokenformer.models.paths")
        == set()
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=str
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_after(run_help(*arguments)) == set()


def test_help_is_quick() -> None:
    """Processor time, which a busy machine does not change much; the best of three."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", run_help("--help")], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 1.0


def test_help_lists_every_command_with_examples() -> None:
    def output(*arguments: str) -> str:
        code = run_help(*arguments)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    listed = output("--help")
    for name in COMMANDS:
        assert name in listed
        assert f"tokenformer {name}" in output(name, "--help")


@pytest.mark.parametrize("name", tokenformer.__all__)
def test_public_names_resolve_and_are_documented(name: str) -> None:
    value = getattr(tokenformer, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(tokenformer)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'tokenformer' has no attribute 'grwo'"):
        tokenformer.grwo  # noqa: B018
    with pytest.raises(ImportError):
        from tokenformer import grwo  # type: ignore[attr-defined]  # noqa: F401
