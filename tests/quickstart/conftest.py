"""The quickstart in a setting of seconds: a few files, models of a few thousand parameters, a handful of steps."""

from __future__ import annotations

from pathlib import Path

import pytest

_TOKENFORMER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small files with some structure in them."""
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    folder.mkdir()
    for index in range(10):
        lines = [f"def f{line}_{index}(x):\n    return x + {line * index}\n" for line in range(30)]
        (folder / f"file{index}.{'txt' if index % 3 else 'py'}").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny_plan(corpus: Path) -> list[str]:
    """Overrides that make the built-in plan tiny; its structure stays."""
    overrides = {
        "corpus": f"[{corpus}]",
        "validation_fraction": 0.3,
        "evaluation_tokens": 256,
        "new_tokens": 12,
        "shared.data.sequence_length": 16,
        "shared.data.batch_tokens": 64,
        "shared.evaluation.every_steps": 2,
        "shared.evaluation.max_tokens": 128,
        "shared.checkpoint.every_steps": 2,
        "shared.logging.every_steps": 1,
        "shared.logging.tensorboard": "false",
        "runs.small.steps": 3,
        "runs.grown.steps": 3,
        "runs.transformer.model.intermediate_size": 64,
    }
    for run, tokens in (("small", 8), ("large", 28), ("transformer", None)):
        overrides |= {f"runs.{run}.model.{name}": size for name, size in _TOKENFORMER.items()}
        if tokens is not None:
            sizes = {"qkv": tokens, "proj": tokens, "ffn": 4 * tokens}
            overrides |= {f"runs.{run}.model.{role}_param_tokens": size for role, size in sizes.items()}
    return [f"{name}={value}" for name, value in overrides.items()]
